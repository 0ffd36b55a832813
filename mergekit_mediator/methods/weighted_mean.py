"""The dense expert: base plus weighted mean of the task vectors, computed in float32 chunk by chunk."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mergekit_mediator.delta.chunks import chunks, float_on
from mergekit_mediator.delta.narrow import lost_magnitude, range_error


class WeightedSum:
    """Σ_t w_t (θ_t − θ_0) of experts that come one by one, with all w_t scaled so that the largest is 1.

    Attributes:
        total: the sum over the experts so far, `[numel]` float32. Where all w_t are equal, it is the plain
            sum of the task vectors, which float32 holds exactly for nearly all weights of 16 bits.
    """

    def __init__(self, base: Tensor, shares: Sequence[float], device: str = "cpu") -> None:
        """Start with the sum 0.

        Args:
            base: θ_0, of any shape and floating dtype.
            shares: w_t in the order in which the experts come; their sum is positive.
            device: the device that computes.
        """
        self._base, self._device = base.to(device), device
        self._shares = iter(share / max(shares) for share in shares)
        self.total = torch.zeros(base.numel(), device=device)

    def add(self, expert: Tensor) -> None:
        """Add the next expert, a tensor of the base's shape and any floating dtype."""
        base, expert, share = self._base.reshape(-1), expert.reshape(-1), next(self._shares)
        for part in chunks(base.numel(), self._device):
            tau = float_on(self._device, expert[part]) - float_on(self._device, base[part])
            self.total[part].add_(tau, alpha=share)


def on_base(
    base: Tensor,
    total: Tensor,
    shares: Sequence[float],
    scale: float,
    dtype: torch.dtype,
    where: str,
    finite: bool = False,
) -> Tensor:
    """Compute θ_0 + λ · Σ_t w_t τ_t / Σ_t w_t, rounded once.

    Args:
        base: θ_0, of any shape and floating dtype.
        total: the total of a `WeightedSum`, `[numel]` float32.
        shares: w_t.
        scale: λ; 1 gives the weighted mean of the experts.
        dtype: the dtype of the result.
        where: the name of the weight, for the error message.
        finite: whether the base and all experts are finite.

    Returns:
        A tensor of the base's shape, on the base's device.

    Raises:
        InputError: a number of the result is finite in float32, but infinite in `dtype`; or the inputs are
            finite, but the result is beyond the range of float32.
    """
    factor = scale * max(shares) / sum(shares)
    result = torch.empty(base.shape, dtype=dtype, device=base.device)
    flat_base, flat_result = base.reshape(-1), result.view(-1)
    lost = 0.0
    for part in chunks(base.numel(), total.device):
        reference = float_on(total.device, flat_base[part])
        merged = torch.add(reference, total[part], alpha=factor)
        lost = max(lost, lost_magnitude(merged, dtype, finite))
        flat_result[part] = merged
    if lost:
        raise range_error(where, lost, dtype)
    return result


def average(
    base: Tensor,
    experts: Iterable[Tensor],
    shares: Sequence[float],
    scale: float,
    dtype: torch.dtype,
    where: str,
    device: str = "cpu",
) -> Tensor:
    """Compute the dense expert's weight from a whole sequence of experts; see `WeightedSum` and `on_base`."""
    weighted = WeightedSum(base, shares, device)
    for expert in experts:
        weighted.add(expert)
    return on_base(base, weighted.total, shares, scale, dtype, where)
