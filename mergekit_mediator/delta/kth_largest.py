"""The exact k-th largest magnitude of a tensor; it is not sorted, and no copy of it is in memory."""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergekit_mediator.delta.chunks import chunks

# The sample for the bracket has one of so many values, within the two limits.
_SAMPLED = 256
_LEAST_SAMPLE, _MOST_SAMPLE = 1 << 11, 1 << 16
_COMPARISONS: dict[np.ufunc, Callable[[Tensor, float], Tensor]] = {
    np.greater: torch.gt,
    np.greater_equal: torch.ge,
    np.less: torch.lt,
    np.less_equal: torch.le,
    np.equal: torch.eq,
}
# If so much of a bracket is one value, that value is likely the answer.
_TIED = 0.25


def count_kept(numel: int, fraction: float) -> int:
    """Count the coordinates that a fraction in (0, 1] of `numel` keeps: rounded, and at least one if there are any."""
    return min(numel, max(1, round(fraction * numel))) if numel else 0


def kth_largest(
    magnitudes: Callable[[slice], Tensor],
    numel: int,
    k: int,
    device: str | torch.device = "cpu",
) -> tuple[float, int]:
    """Find the k-th largest of `numel` values, exactly.

    A strided sample brackets the answer, and only the few values inside the bracket are ordered (the idea of
    Floyd and Rivest, 1975). If the answer is outside the bracket, all values are ordered.

    Args:
        magnitudes: gives the values of a slice as float32 `[n]`, at least 0 and not NaN.
        numel: the number of values.
        k: from 1 to `numel`.
        device: the device of the values.

    Returns:
        The k-th largest value, and the number of values that are larger.
    """
    if numel > 8 * _LEAST_SAMPLE:
        bracket, middle = _bracket(magnitudes, numel, k)
        if np.count_nonzero(bracket == middle) >= _TIED * bracket.size:
            larger, ties = _count(middle, magnitudes, numel, device)
            if larger < k <= larger + ties:
                return middle, larger
        above, inside = 0, []
        for part in chunks(numel, device):
            larger, between = _split(magnitudes(part), float(bracket[0]), float(bracket[-1]))
            above += larger
            inside.append(between)
        candidates = torch.cat(inside)
        if above < k <= above + candidates.numel():
            value, larger = _kth_largest_of(candidates, k - above)
            return value, above + larger
    return _kth_largest_of(torch.cat([magnitudes(part) for part in chunks(numel, device)]), k)


def compare(values: Tensor, limit: float, how: np.ufunc) -> Tensor:
    """Compare float32 values `[n]` with a limit, where the values are; numpy is faster at this than torch on a CPU.

    Args:
        values: on any device.
        limit: of the comparison, a value of float32.
        how: the comparison, such as `np.greater`.

    Returns:
        `[n]` bool, whether the comparison holds.
    """
    if values.device.type != "cpu":
        return _COMPARISONS[how](values, limit)
    return torch.from_numpy(how(values.numpy(), np.float32(limit)))


def nonzero(mask: Tensor) -> Tensor:
    """List the ascending positions `[k]` int64 of the true entries of a mask `[n]`.

    numpy is several times faster at this than torch on a CPU.
    """
    if mask.device.type == "cpu":
        return torch.from_numpy(mask.numpy().nonzero()[0])
    return mask.nonzero().reshape(-1)


def lower_bound(magnitudes: Callable[[slice], Tensor], numel: int, k: int) -> float:
    """Find a value by a sample that the k-th largest is most likely not below.

    Args:
        magnitudes: as for `kth_largest`; slices may have a step.
        numel: the number of values, at least 1.
        k: from 1 to `numel`.
    """
    bracket, _ = _bracket(magnitudes, numel, k)
    return float(bracket[0])


def _bracket(
    magnitudes: Callable[[slice], Tensor], numel: int, k: int
) -> tuple[NDArray[np.float32], float]:
    """Ascending values of a sample, with the k-th largest of all most likely between the first and the last.

    The second result is the value at the place of the k-th largest.
    """
    size = min(max(numel // _SAMPLED, _LEAST_SAMPLE), _MOST_SAMPLE)
    # An even stride might walk down a single column of a matrix.
    sample = np.sort(magnitudes(slice(0, numel, (numel // size) | 1)).cpu().numpy())
    share = k / numel
    rank = share * sample.size
    slack = 3 * math.sqrt(rank * (1 - share)) + 4
    place = sample.size - 1 - rank
    first = max(0, math.floor(place - slack))
    last = min(sample.size - 1, math.ceil(place + slack))
    return sample[first : last + 1], float(sample[max(0, round(place))])


def _count(
    value: float, magnitudes: Callable[[slice], Tensor], numel: int, device: str | torch.device
) -> tuple[int, int]:
    """The numbers of larger and of equal values.

    Differences of 16-bit weights take few values. Counting one is far faster than extracting all its ties.
    """
    larger = ties = 0
    for part in chunks(numel, device):
        chunk = magnitudes(part)
        larger += _true(compare(chunk, value, np.greater))
        ties += _true(compare(chunk, value, np.equal))
    return larger, ties


def _split(values: Tensor, low: float, high: float) -> tuple[int, Tensor]:
    """The number of values above `high`, and the values from `low` to `high`; numpy is faster on a CPU."""
    if values.device.type != "cpu":
        return int((values > high).sum()), values[(values >= low) & (values <= high)]
    array, larger = values.numpy(), compare(values, high, np.greater).numpy()
    between = array[(compare(values, low, np.greater_equal).numpy() ^ larger).nonzero()[0]]
    return int(np.count_nonzero(larger)), torch.from_numpy(between)


def _true(mask: Tensor) -> int:
    """The number of true entries of a mask."""
    if mask.device.type == "cpu":
        return int(np.count_nonzero(mask.numpy()))
    return int(mask.sum())


def _kth_largest_of(values: Tensor, k: int) -> tuple[float, int]:
    value = float(torch.kthvalue(values, values.numel() - k + 1).values)
    return value, int((values > value).sum())
