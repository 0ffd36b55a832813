"""The exact k-th largest magnitude of a tensor, without sorting it and without holding its magnitudes."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

# Small enough for a processor's cache, large enough to hide the cost of calling torch.
CHUNK = 1 << 18
_SAMPLE = 1 << 14
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
    if numel > 8 * _SAMPLE:
        bracket = _bracket(magnitudes, numel, k)
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


def nonzero(mask: Tensor) -> Tensor:
    """Ascending positions `[k]` int64 of the true entries of a mask `[n]`.

    numpy is several times faster than torch at this on a CPU.
    """
    if mask.device.type == "cpu":
        return torch.from_numpy(mask.numpy().nonzero()[0])
    return mask.nonzero().reshape(-1)


def _bracket(magnitudes: Callable[[slice], Tensor], numel: int, k: int) -> list[float]:
    """The sampled values, ascending and each once, among which the answer most likely is."""
    # an odd stride does not walk down a single column of a matrix
    sample = magnitudes(slice(0, numel, (numel // _SAMPLE) | 1)).sort(descending=True).values
    share = k / numel
    rank = share * sample.numel()
    slack = 4 * math.sqrt(rank * (1 - share)) + 4
    first = max(0, math.floor(rank - slack))
    last = min(sample.numel() - 1, math.ceil(rank + slack))
    return sorted(set(sample[first : last + 1].tolist()))


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
            above[index] += _count(chunk, value, np.greater)
            equal[index] += _count(chunk, value, np.equal)
    for value, larger, ties in zip(values, above, equal, strict=True):
        if larger < k <= larger + ties:
            return value, larger
    return None


def _count(values: Tensor, value: float, compare: np.ufunc) -> int:
    """How many values compare so; in numpy, which is faster than torch at this on a CPU."""
    matches = compare(values.cpu().numpy(), np.float32(value))
    return int(np.count_nonzero(matches))


def _split(values: Tensor, low: float, high: float) -> tuple[int, Tensor]:
    """How many values are above `high`, and those from `low` to `high`; in numpy on a CPU, for speed."""
    if values.device.type != "cpu":
        return int((values > high).sum()), values[(values >= low) & (values <= high)]
    array = values.numpy()
    between = array[((array >= low) & (array <= high)).nonzero()[0]]
    return int(np.count_nonzero(array > high)), torch.from_numpy(between)


def _kth_largest_of(values: Tensor, k: int) -> tuple[float, int]:
    value = float(torch.kthvalue(values, values.numel() - k + 1).values)
    return value, int((values > value).sum())
