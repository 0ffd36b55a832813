"""`wudi`: the sum of the task vectors, moved towards where it interferes least with the inputs of each."""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from mergekit_mediator.methods.singular import gram, row_blocks, times, wide
from mergekit_mediator.methods.task_vector_method import (
    ModelWeight,
    TaskVectorMethod,
    mean,
    shared,
    task_vector_spec,
)

# Of Adam, as torch has them.
_FIRST, _SECOND, _EPSILON = 0.9, 0.999, 1e-8


class Wudi(TaskVectorMethod):
    """WUDI-Merging: Cheng et al., "Whoever Started the Interference Should End It" (2025), equation 10.

    Adam moves the merged task vector M from Σ_t τ_t towards the minimum of Σ_t ‖(M − τ_t) τ_tᵀ‖² / ‖τ_t‖², and stops
    long before it: the minimum itself keeps less than the sum does. The authors take 300 steps of 1e-5; 30 steps of
    1e-4 go as far in a tenth of the time. Weights that are no matrices get the mean of the task vectors.
    """

    spec = task_vector_spec(
        "wudi",
        "WUDI-Merging",
        "https://arxiv.org/abs/2503.08099",
        shared("steps", Annotated[int, Field(ge=0)], 30),
        shared("rate", Annotated[float, Field(gt=0, allow_inf_nan=False)], 1e-4),
    )

    def combine(self, weight: ModelWeight, parameters: Mapping[str, Any]) -> Tensor:
        """See the class."""
        if not weight.is_matrix:
            return mean(weight)
        return less_interference(weight.taus, parameters["steps"], parameters["rate"])


def less_interference(taus: Tensor, steps: int, rate: float) -> Tensor:
    """Take steps of Adam from the sum of the task vectors towards the least interference.

    With G_t = τ_tᵀ τ_t / ‖τ_t‖² the gradient is 2 (M Σ_t G_t − Σ_t τ_t G_t): one product a step, and rows do not meet.

    Args:
        taus: `[experts, m, n]` float32.
        steps: of Adam.
        rate: of each step, in the unit of the weights.

    Returns:
        `[m, n]` float32.
    """
    merged = taus.sum(dim=0)
    total, wanted = wide(taus.new_zeros(taus.shape[2], taus.shape[2])), torch.zeros_like(merged)
    for tau, size in zip(taus, taus.flatten(1).norm(dim=1).tolist(), strict=True):
        if size:
            of_expert = gram(tau).mul_(2 / size**2)
            total.add_(of_expert)
            wanted.add_(times(tau, of_expert))
    total = total.to(torch.float32)
    for rows in row_blocks(len(merged)):
        _adam(merged[rows], total, wanted[rows], steps, rate)
    return merged


def _adam(place: Tensor, total: Tensor, wanted: Tensor, steps: int, rate: float) -> None:
    """Move a point in place along the gradient `place @ total - wanted`."""
    first, second = torch.zeros_like(place), torch.zeros_like(place)
    for step in range(1, steps + 1):
        gradient = torch.addmm(wanted, place, total, beta=-1)
        first.lerp_(gradient, 1 - _FIRST)
        second.mul_(_SECOND).addcmul_(gradient, gradient, value=1 - _SECOND)
        size = second.sqrt().div_((1 - _SECOND**step) ** 0.5).add_(_EPSILON)
        place.addcdiv_(first, size, value=-rate / (1 - _FIRST**step))
