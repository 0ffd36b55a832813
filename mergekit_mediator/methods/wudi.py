"""`wudi`: the task vector that interferes least with the inputs of every expert's own."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_mediator.methods.singular import wide
from mergekit_mediator.methods.task_vector_method import (
    ModelWeight,
    TaskVectorMethod,
    mean,
    task_vector_spec,
)

# Of the mean eigenvalue of H: it decides nothing but what is 0/0, directions that no task vector has.
_RIDGE = 1e-10


class Wudi(TaskVectorMethod):
    """WUDI-Merging: Cheng et al., "Whoever Started the Interference Should End It" (2025), equation 10.

    The merged task vector M minimises Σ_t ‖(M − τ_t) τ_tᵀ‖² / ‖τ_t‖². The authors take 300 steps of Adam towards
    that minimum. It has a closed form: M = (Σ_t τ_t G_t) (Σ_t G_t)⁻¹ with G_t = τ_tᵀ τ_t / ‖τ_t‖². Weights that
    are no matrices get the mean of the task vectors.
    """

    spec = task_vector_spec("wudi", "WUDI-Merging", "https://arxiv.org/abs/2503.08099")

    def combine(self, weight: ModelWeight, parameters: Mapping[str, Any]) -> Tensor:
        """See the class."""
        return least_interference(weight.taus) if weight.is_matrix else mean(weight)


def least_interference(taus: Tensor) -> Tensor:
    """Solve M Σ_t G_t = Σ_t τ_t G_t.

    Args:
        taus: `[experts, m, n]` float32.

    Returns:
        M `[m, n]` float32; 0 where no task vector has anything.
    """
    total = wide(torch.zeros_like(taus[0]))
    grams = total.new_zeros(taus.shape[2], taus.shape[2])
    for tau in taus:
        size = float(tau.norm())
        if size:
            unit = wide(tau) / size
            grams.addmm_(unit.mT, unit)
            total.add_(_times_gram(unit), alpha=size)
    ridge = _RIDGE * float(grams.diagonal().mean())
    if not ridge:
        return taus[0]
    grams.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(grams)
    return torch.cholesky_solve(total.mT, factor).mT.to(torch.float32)


def _times_gram(matrix: Tensor) -> Tensor:
    """X XᵀX, by the smaller of the two Gram matrices."""
    if matrix.shape[0] < matrix.shape[1]:
        return (matrix @ matrix.mT) @ matrix
    return matrix @ (matrix.mT @ matrix)
