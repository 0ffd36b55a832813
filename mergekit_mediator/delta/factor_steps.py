"""How finely the vectors of a low-rank component are kept: each in the steps that are worth their bits.

A vector of length n is kept in whole steps of 2 · 2^(−fineness/2) times its root mean square. What that takes
and keeps is known beforehand, since the vectors of a decomposition are close to Gaussian.
"""

import torch
from torch import Tensor

# By fineness, for Gaussian numbers: entropy in bits of a rounded one, and the part of a component's squared norm
# that is kept if both its vectors are rounded so and scaled best (the fourth power of the correlation of a
# number with its rounded one).
BITS = torch.tensor(
    [1.241, 1.658, 2.105, 2.577, 3.062, 3.555, 4.051, 4.549, 5.048, 5.548, 6.046],
    dtype=torch.float64,
)
KEPT = torch.tensor(
    [0.557, 0.7347, 0.8521, 0.9216, 0.9596, 0.9795, 0.9897, 0.9948, 0.9974, 0.9987, 0.9993],
    dtype=torch.float64,
)
# A slope is the squared error that is saved by a number kept in steps of its root mean square.
_SAVED_PER_BIT = float(KEPT[2] / BITS[2])
# A component is worth keeping from this many times the slope for each number on, in the steps that suit it best.
LEAST_SLOPES = float(_SAVED_PER_BIT / (KEPT / BITS).max())


def fineness(squares: Tensor, numbers: int, slope: float) -> Tensor:
    """The fineness at which each component saves most squared error beyond the price of its bits, `[r]` int64.

    Args:
        squares: `[r]` float64, the squared norms of the components.
        numbers: that each of them takes, out + in.
        slope: squared error that a number in steps of its root mean square must save.
    """
    price = slope * _SAVED_PER_BIT * numbers
    saved = KEPT[:, None] * squares - price * BITS[:, None]
    return saved.argmax(dim=0)


def codes(vectors: Tensor, fineness: Tensor) -> Tensor:
    """int8 codes `[n, r]` of unit vectors.

    Args:
        vectors: `[n, r]`, of length 1.
        fineness: `[r]`, of each.
    """
    steps = 2 * torch.exp2(-fineness.to(torch.float32) / 2) / vectors.shape[0] ** 0.5
    # a vector with few large entries takes larger steps rather than lose them
    steps = torch.maximum(steps, vectors.abs().amax(0) / 127)
    rounded: Tensor = (vectors / steps).round_()
    return rounded.to(torch.int8)
