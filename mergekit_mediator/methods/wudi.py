"""`wudi`: the task vector that interferes least with the inputs of every expert's own."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_mediator.methods.singular import gram, row_blocks, wide
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
    sizes = taus.flatten(1).norm(dim=1)
    shares = torch.where(sizes > 0, sizes.square().reciprocal(), torch.zeros_like(sizes)).tolist()
    tall = taus.shape[1] >= taus.shape[2]
    total, smaller = wide(taus.new_zeros(taus.shape[2], taus.shape[2])), []
    for tau, share in zip(taus, shares, strict=True):
        own = gram(tau).mul_(share)
        total.add_(own)
        # τ G is (ττᵀ) τ as well: the smaller of the two Gram matrices is kept
        smaller.append(own if tall else gram(tau.mT).mul_(share))
        del own
    ridge = _RIDGE * float(total.diagonal().mean())
    if not ridge:
        return torch.zeros_like(taus[0])
    total.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(total)
    del total
    merged = torch.empty_like(taus[0])
    for rows in row_blocks(len(merged)):
        wanted = wide(torch.zeros_like(merged[rows]))
        for tau, of_expert in zip(taus, smaller, strict=True):
            if tall:
                wanted.addmm_(wide(tau[rows]), of_expert)
            else:
                wanted.addmm_(of_expert[rows], wide(tau))
        merged[rows] = torch.cholesky_solve(wanted.mT, factor).mT
    return merged
