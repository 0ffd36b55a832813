"""Floats as integers in the order of their values, so that near weights have near integers."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}
# Kept weights are ordered by exponent within blocks of this many, which fit a processor's cache.
_BLOCK = 1 << 20


def bit_patterns(weights: Tensor) -> Tensor:
    """The bits of each float as a signed integer of the same size."""
    return weights.contiguous().view(_INTEGERS[weights.element_size()])


def to_ordered(weights: Tensor) -> Tensor:
    """Integers that ascend with the weights; -0 comes just before 0. Each one stands for one bit pattern."""
    return _flipped_if_negative(bit_patterns(weights))


def from_ordered(integers: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights of `to_ordered`."""
    return _flipped_if_negative(integers).view(dtype)


def _flipped_if_negative(integers: Tensor) -> Tensor:
    """All bits but the sign flipped where the sign is set; without a branch, several times faster."""
    sign = integers >> (8 * integers.element_size() - 1)
    return integers ^ (sign & torch.iinfo(integers.dtype).max)


def raw_bytes(values: Tensor) -> NDArray[np.uint8]:
    """The bytes of a tensor as they lie in memory, row by row: `[numel * itemsize]`."""
    flat = values.contiguous().view(-1)
    # an empty tensor may have a stride that no view allows
    array: NDArray[np.uint8] = (
        (flat if flat.numel() else flat.new_empty(0)).view(torch.uint8).numpy()
    )
    return array


def by_exponent(weights: Tensor) -> NDArray[np.int64]:
    """An order `[n]` that puts weights of equal exponent together, block by block.

    A step of the ordered integers is worth a factor of two more with each exponent, so integers at
    equal exponents have like sizes and code well together.
    """
    shift = _MANTISSA_BITS[weights.dtype]
    patterns = bit_patterns(weights).numpy()
    order = np.empty(patterns.size, dtype=np.int64)
    for start in range(0, patterns.size, _BLOCK):
        block = patterns[start : start + _BLOCK]
        exponents = (block >> shift) & (0xFF if shift != 52 else 0x7FF)
        # numpy sorts integers of up to 16 bits by radix
        narrow = exponents.astype(np.uint8 if shift != 52 else np.uint16)
        order[start : start + _BLOCK] = np.argsort(narrow, kind="stable") + start
    return order
