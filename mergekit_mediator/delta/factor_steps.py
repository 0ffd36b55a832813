"""The steps in which the vectors of a low-rank component are stored: each step is worth its bits.

A vector of n numbers is stored in whole steps of 2 · 2^(−fineness/2) times its root mean square. The vectors of
a decomposition are close to Gaussian, so a table gives the bits that they take and the part that they keep.
"""

import torch
from torch import Tensor

# By fineness, for Gaussian numbers: the entropy of a rounded number in bits, and the part of a component's
# squared norm that remains when both its vectors are rounded and scaled best. That part is the fourth power of
# the correlation between a number and the rounded one.
BITS = torch.tensor(
    [1.241, 1.658, 2.105, 2.577, 3.062, 3.555, 4.051, 4.549, 5.048, 5.548, 6.046],
    dtype=torch.float64,
)
KEPT = torch.tensor(
    [0.557, 0.7347, 0.8521, 0.9216, 0.9596, 0.9795, 0.9897, 0.9948, 0.9974, 0.9987, 0.9993],
    dtype=torch.float64,
)
# A slope is the squared error that a number saves when its step is the root mean square: fineness 2.
_SAVED_PER_BIT = float(KEPT[2] / BITS[2])
# A component is worth storing, in its best steps, if its squared norm is at least this times the slope for each
# of its numbers.
LEAST_SLOPES = float(_SAVED_PER_BIT / (KEPT / BITS).max())


def fineness(squares: Tensor, numbers: int, slopes: Tensor) -> Tensor:
    """Choose the fineness at which each component saves most squared error beyond the price of its bits.

    Args:
        squares: `[r]` float64, the squared norms of the components.
        numbers: of each component, out + in.
        slopes: `[n, 1]` float64, the squared error that a number must save when its step is the root mean square.

    Returns:
        `[n, r]` int64, indices into `BITS` and `KEPT`.
    """
    price = slopes * _SAVED_PER_BIT * numbers
    saved = KEPT[:, None, None] * squares - price * BITS[:, None, None]
    return saved.argmax(dim=0)


def codes(vectors: Tensor, fineness: Tensor) -> Tensor:
    """Round unit vectors to int8 codes `[n, r]`.

    Args:
        vectors: `[n, r]` float32, columns of length 1.
        fineness: `[r]` int64, of each column.
    """
    steps = 2 * torch.exp2(-fineness.to(vectors) / 2) / vectors.shape[0] ** 0.5
    # A vector with few large entries takes larger steps, so that no entry is cut off.
    steps = torch.maximum(steps, vectors.abs().amax(0) / 127)
    rounded: Tensor = (vectors / steps).round_()
    return rounded.to(torch.int8)
