"""The dense expert: the weighted mean of the task vectors on top of the base, in float32 chunk by chunk."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mergekit_mediator.delta.kth_largest import chunks
from mergekit_mediator.delta.narrow import lost_magnitude, range_error


class WeightedSum:
    """Σ_t w_t (θ_t − θ_0) of experts that come one by one, with the largest w_t taken as 1.

    Attributes:
        total: of the experts so far, flat, float32. Where all weights are equal it is the plain sum of
            the task vectors, which in float32 is exact for nearly all weights of 16 bits.
    """

    def __init__(self, base: Tensor, shares: Sequence[float], device: str = "cpu") -> None:
        """
        Args:
            base: any shape, any floating dtype.
            shares: w_t of the experts in the order in which they come, with a positive sum.
            device: where the arithmetic is done.
        """
        self._base, self._device = base, device
        self._shares = iter(share / max(shares) for share in shares)
        self.total = torch.zeros(base.numel(), device=device)

    def add(self, expert: Tensor) -> None:
        """Add the next expert, of the base's shape."""
        base, expert, share = self._base.reshape(-1), expert.reshape(-1), next(self._shares)
        for part in chunks(base.numel()):
            tau = expert[part].to(self._device, torch.float32)
            tau = tau - base[part].to(self._device, torch.float32)
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
    """θ_0 + λ · Σ_t w_t τ_t / Σ_t w_t, rounded once.

    Args:
        base: any shape, any floating dtype.
        total: of a `WeightedSum`.
        shares: w_t.
        scale: λ; 1 gives the weighted mean of the experts.
        dtype: of the result, which is where the base is.
        where: the weight, for the error message.
        finite: whether the base and all experts are.

    Raises:
        InputError: a finite number of the result is infinite in that dtype; or, if all that it is made of is
            finite, beyond float32.
    """
    factor = scale * max(shares) / sum(shares)
    result = torch.empty(base.shape, dtype=dtype, device=base.device)
    flat_base, flat_result = base.reshape(-1), result.view(-1)
    lost = 0.0
    for part in chunks(base.numel()):
        reference = flat_base[part].to(total.device, torch.float32)
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
    """The dense expert's weight of experts that are all there; see `WeightedSum` and `on_base`."""
    weighted = WeightedSum(base, shares, device)
    for expert in experts:
        weighted.add(expert)
    return on_base(base, weighted.total, shares, scale, dtype, where)
