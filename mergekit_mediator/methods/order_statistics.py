"""Exact order statistics of more values than fit into memory, in two passes over them."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from mergekit_mediator.delta.chunks import chunks

_HALF = 1 << 16


def order_statistics(
    parts: Callable[[], Iterable[Tensor]], positions: Callable[[int], Sequence[int]]
) -> Tensor:
    """The values at some positions of each row, were the rows sorted.

    The first pass counts the upper halves of the bit patterns, the second the lower halves of those that share
    the upper half with an answer: a radix selection with two digits of 16 bits.

    Args:
        parts: begins a pass: gives the values in parts `[rows, n]` float32, not NaN.
        positions: gives for the length of the rows the positions asked for, from 0 for the smallest.

    Returns:
        `[rows, positions]` float32, on the device of the parts. Empty where there is no part.
    """
    upper: Tensor | None = None
    for part in parts():
        keys = _sortable(part)
        counted = _histogram((keys >> 16) + (_HALF >> 1))
        upper = counted if upper is None else upper.add_(counted)
    if upper is None:
        return torch.empty(0, 0)
    totals = upper.cumsum(dim=1)
    asked = torch.tensor(positions(int(totals[0, -1])), device=upper.device).expand(len(upper), -1)
    digits = torch.searchsorted(totals, asked.contiguous(), right=True)
    before = (totals - upper).gather(1, digits)
    lower = torch.zeros((*digits.shape, _HALF), dtype=torch.int64, device=upper.device)
    for part in parts():
        keys = _sortable(part)
        high = (keys >> 16) + (_HALF >> 1)
        for row, of_row in enumerate(digits.tolist()):
            for index, digit in enumerate(of_row):
                low = keys[row][high[row] == digit] & (_HALF - 1)
                lower[row, index] += torch.bincount(low, minlength=_HALF)
    rest = torch.searchsorted(lower.cumsum(dim=2), (asked - before)[..., None], right=True)
    return _value(((digits - (_HALF >> 1)) << 16) | rest[..., 0])


def flat_chunks(taus: Tensor) -> Iterator[Tensor]:
    """Chunks `[experts, n]` of task vectors `[experts, *shape]`, each small enough for a processor's cache."""
    flat = taus.flatten(1)
    for part in chunks(flat.shape[1], flat.device):
        yield flat[:, part]


def _sortable(values: Tensor) -> Tensor:
    """Integers int32 in the order of float32 values: the bits of negative ones are turned around."""
    bits = values.contiguous().view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _value(keys: Tensor) -> Tensor:
    """The float32 values of sortable integers."""
    bits = keys.to(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _histogram(digits: Tensor) -> Tensor:
    """Count how often each digit occurs in each row, `[rows, 65536]` int64."""
    rows = torch.arange(len(digits), device=digits.device, dtype=digits.dtype)[:, None] * _HALF
    return torch.bincount((digits + rows).flatten(), minlength=len(digits) * _HALF).view(-1, _HALF)
