"""The exact k-th largest magnitude of a tensor, without sorting it and without holding its magnitudes."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Small enough for a processor's cache, large enough to hide the cost of calling torch; a multiple of 8.
CHUNK = 1 << 17
# The bracket is sought in one of so many values, but in this many at least and at most.
_SAMPLED = 256
_LEAST_SAMPLE, _MOST_SAMPLE = 1 << 11, 1 << 16
_FEW = 4


def chunks(numel: int) -> Iterator[slice]:
    """Slices of at most CHUNK coordinates that cover `numel` of them."""
    for start in range(0, numel, CHUNK):
        yield slice(start, min(start + CHUNK, numel))


def count_kept(numel: int, fraction: float) -> int:
    """How many of `numel` coordinates a fraction in (0, 1] keeps: rounded, at least one if there are any."""
    return min(numel, max(1, round(fraction * numel))) if numel else 0


def kth_largest(magnitudes: Callable[[slice], Tensor], numel: int, k: int) -> tuple[float, int]:
    """The k-th largest of `numel` values, exactly, and how many values are larger than it.

    A strided sample brackets the answer, so that only the few values inside the bracket are
    ordered (the idea of Floyd and Rivest, 1975); where the bracket misses, all of them are.

    Args:
        magnitudes: gives the values of a slice as float32 `[n]`, at least 0 and not NaN.
        numel: how many values there are.
        k: from 1 to `numel`.
    """
    if numel > 8 * _LEAST_SAMPLE:
        bracket = bracket_of(magnitudes, numel, k)
        if len(bracket) <= _FEW:
            found = _among(bracket, magnitudes, numel, k)
            if found is not None:
                return found
        low, high = bracket[0], bracket[-1]
        above, inside = 0, []
        for part in chunks(numel):
            larger, between = _split(magnitudes(part), low, high)
            above += larger
            inside.append(between)
        candidates = torch.cat(inside)
        if above < k <= above + candidates.numel():
            value, larger = _kth_largest_of(candidates, k - above)
            return value, above + larger
    return _kth_largest_of(torch.cat([magnitudes(part) for part in chunks(numel)]), k)


def compare(values: Tensor, limit: float, how: np.ufunc) -> NDArray[np.bool_]:
    """Where float32 values compare so with a limit; in numpy, which is faster than torch at this on a CPU."""
    result: NDArray[np.bool_] = how(values.cpu().numpy(), np.float32(limit))
    return result


def nonzero(mask: Tensor) -> Tensor:
    """Ascending positions `[k]` int64 of the true entries of a mask `[n]`.

    numpy is several times faster than torch at this on a CPU.
    """
    if mask.device.type == "cpu":
        return torch.from_numpy(mask.numpy().nonzero()[0])
    return mask.nonzero().reshape(-1)


def bracket_of(magnitudes: Callable[[slice], Tensor], numel: int, k: int) -> list[float]:
    """Values, ascending and each once, between the first and last of which the k-th largest most likely is.

    Args:
        magnitudes: as for `kth_largest`; slices may have a step.
        numel: how many values there are, at least 1.
        k: from 1 to `numel`.
    """
    size = min(max(numel // _SAMPLED, _LEAST_SAMPLE), _MOST_SAMPLE)
    # an odd stride does not walk down a single column of a matrix
    sample = np.sort(magnitudes(slice(0, numel, (numel // size) | 1)).cpu().numpy())
    share = k / numel
    rank = share * sample.size
    slack = 3 * math.sqrt(rank * (1 - share)) + 4
    first = max(0, math.floor(sample.size - 1 - rank - slack))
    last = min(sample.size - 1, math.ceil(sample.size - 1 - rank + slack))
    found: list[float] = np.unique(sample[first : last + 1]).tolist()
    return found


def _among(
    values: list[float], magnitudes: Callable[[slice], Tensor], numel: int, k: int
) -> tuple[float, int] | None:
    """The answer if it is one of a few values, by counting; else None.

    Differences of 16-bit weights take few values: extracting all that tie would take far longer.
    """
    above, equal = [0] * len(values), [0] * len(values)
    for part in chunks(numel):
        chunk = magnitudes(part)
        for index, value in enumerate(values):
            above[index] += int(np.count_nonzero(compare(chunk, value, np.greater)))
            equal[index] += int(np.count_nonzero(compare(chunk, value, np.equal)))
    for value, larger, ties in zip(values, above, equal, strict=True):
        if larger < k <= larger + ties:
            return value, larger
    return None


def _split(values: Tensor, low: float, high: float) -> tuple[int, Tensor]:
    """How many values are above `high`, and those from `low` to `high`; in numpy on a CPU, for speed."""
    if values.device.type != "cpu":
        return int((values > high).sum()), values[(values >= low) & (values <= high)]
    array, larger = values.numpy(), compare(values, high, np.greater)
    between = array[(compare(values, low, np.greater_equal) ^ larger).nonzero()[0]]
    return int(np.count_nonzero(larger)), torch.from_numpy(between)


def _kth_largest_of(values: Tensor, k: int) -> tuple[float, int]:
    value = float(torch.kthvalue(values, values.numel() - k + 1).values)
    return value, int((values > value).sum())
