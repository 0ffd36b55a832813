"""How experts share a budget: so that what all of them lose together is predicted to be least.

An expert that changed little would be left with hardly any bits if squared error alone were weighed. What it
loses depends on the part of its own change that is left out: about the fifth power of it.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mergekit_mediator.delta.tradeoff import SLOPES
from mergekit_mediator.errors import ConfigError

# The divergence of an expert's answers from those of the whole expert, and the part of the loss between
# average and expert that is not recovered, are about this power of the part of the squared change that is
# left out: in tests/benchmarks/results/codec.json 5 for weak fine-tunes at half a bit and more, 7 for strong ones.
LOSS_POWER = 5
_STEPS = 64  # between two slopes of the grid
_ROUNDS = 80
_SMALLEST = 1e-300

Floats = NDArray[np.float64]


class Allocation:
    """What experts can take and leave out, and how they share any number of bits."""

    def __init__(self, tradeoffs: Sequence[Tensor]) -> None:
        """
        Args:
            tradeoffs: by expert, `[2, len(SLOPES)]`: bits and squared error at each slope, of all its weights;
                see `tradeoff.tradeoff`.
        """
        count = len(SLOPES)
        self._grid = np.linspace(0, count - 1, (count - 1) * _STEPS + 1)
        curves = [self._curve(tradeoff.numpy()) for tradeoff in tradeoffs]
        self._bits, self._left = (np.stack(rows) for rows in zip(*curves, strict=True))
        self._loss = self._left**LOSS_POWER

    @property
    def least(self) -> float:
        """The least bits that all experts take together."""
        return float(self._bits[:, 0].sum())

    @property
    def most(self) -> float:
        """The bits at the finest slope, which leaves nothing out to speak of."""
        return float(self._bits[:, -1].sum())

    def left(self, bits: float) -> list[float]:
        """By expert, the part of its squared change in [0, 1] that is left out within `bits` of all."""
        return self._of(self._left, self._within(bits))

    def slopes(self, bits: float) -> list[float]:
        """By expert, the slope within `bits` of all.

        Raises:
            ConfigError: all experts take more at any slope.
        """
        if bits < self.least:
            raise ConfigError(
                f"budget: {math.ceil(self.least / 8):,} bytes for experts required at least, "
                f"{int(bits / 8):,} are left"
            )
        chosen = self._within(bits)
        return [math.pow(2.0, -float(self._grid[i]) / 2) for i in chosen]

    def _curve(self, tradeoff: Floats) -> tuple[Floats, Floats]:
        """Bits and the part left out between the slopes: their logarithms are close to lines there."""
        at = np.arange(len(SLOPES))
        bits, error = tradeoff
        whole = max(float(error[0]), _SMALLEST)
        return (
            np.expm1(np.interp(self._grid, at, np.log1p(bits))),
            np.exp(np.interp(self._grid, at, np.log(np.maximum(error, _SMALLEST) / whole))),
        )

    def _within(self, bits: float) -> NDArray[np.int64]:
        """By expert, the place in the grid where all lose least within `bits` (Everett, 1963)."""
        price, dearer = -700.0, 700.0  # logarithms of loss per bit
        for _ in range(_ROUNDS):
            middle = (price + dearer) / 2
            if self._spent(middle) > bits:
                price = middle
            else:
                dearer = middle
        return self._best(dearer)

    def _best(self, price: float) -> NDArray[np.int64]:
        best: NDArray[np.int64] = (self._loss + math.exp(price) * self._bits).argmin(axis=1)
        return best

    def _spent(self, price: float) -> float:
        return math.fsum(self._of(self._bits, self._best(price)))

    @staticmethod
    def _of(rows: Floats, chosen: NDArray[np.int64]) -> list[float]:
        found: list[float] = np.take_along_axis(rows, chosen[:, None], axis=1)[:, 0].tolist()
        return found
