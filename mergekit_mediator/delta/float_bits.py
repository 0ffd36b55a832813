"""Floats as integers in the order of their values, so that near weights have near integers."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}
# Weights are ordered by exponent within blocks of so many, which fit a processor's cache.
_BLOCK = 1 << 20


def bit_patterns(weights: Tensor) -> Tensor:
    """View floats of any shape as signed integers of the same size."""
    return weights.contiguous().view(_INTEGERS[weights.element_size()])


def to_ordered(weights: Tensor) -> Tensor:
    """Map floats to signed integers of the same size that ascend with them.

    Each integer stands for one bit pattern; -0 comes just before 0. The inverse is `from_ordered`.
    """
    return _flipped_if_negative(bit_patterns(weights))


def from_ordered(integers: Tensor, dtype: torch.dtype) -> Tensor:
    """Map the integers of `to_ordered` back to floats of a dtype."""
    return _flipped_if_negative(integers).view(dtype)


def _flipped_if_negative(integers: Tensor) -> Tensor:
    """Integers with all bits but the sign flipped where the sign is set.

    Without a branch this is several times faster.
    """
    sign = integers >> (8 * integers.element_size() - 1)
    return integers ^ (sign & torch.iinfo(integers.dtype).max)


def raw_bytes(values: Tensor) -> NDArray[np.uint8]:
    """View the bytes of a tensor on the CPU, row by row: `[numel * itemsize]`."""
    flat = values.contiguous().view(-1)
    # An empty tensor may have a stride that no view allows.
    array: NDArray[np.uint8] = (
        (flat if flat.numel() else flat.new_empty(0)).view(torch.uint8).numpy()
    )
    return array


def by_exponent(weights: Tensor) -> NDArray[np.int64]:
    """Compute an order `[n]` of weights `[n]` that puts equal exponents together, block by block.

    A step of the ordered integers doubles its value with each exponent, so differences at equal exponents
    have similar sizes and code well together.
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
