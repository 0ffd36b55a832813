"""How experts share a budget: the predicted loss of all experts together is least.

Squared error alone would leave an expert that changed little with hardly any bits. The loss of an expert is
predicted from its squared error over its own squared change, see `loss_law`. Where prompts measured how far its answers
diverge, the loss is this divergence.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mergekit_mediator.delta.divergence import divergence_curves
from mergekit_mediator.delta.loss_law import LEFT_OUT, LossLaw, Prediction
from mergekit_mediator.delta.tradeoff import SLOPES
from mergekit_mediator.errors import ConfigError

_STEPS = 64  # places of the finer grid between two slopes
_ROUNDS = 80  # halvings of the interval in which the price lies
_SMALLEST = 1e-300  # stands for a squared error of 0, which has no logarithm

Floats = NDArray[np.float64]
# KL(expert ‖ stored) in nats by the slope at which the expert was stored.
Divergences = Mapping[float, float]


class Allocation:
    """The bits and the remaining errors of experts at each slope, and how experts share any number of bits.

    Attributes:
        laws: how the loss of each expert follows from squared error.
    """

    def __init__(
        self,
        tradeoffs: Sequence[Tensor],
        divergences: Sequence[Divergences] = (),
        laws: Sequence[LossLaw] = (),
    ) -> None:
        """Interpolate the curve of each expert between the slopes.

        Args:
            tradeoffs: of each expert, `[4, len(SLOPES)]` float64: the bits and the squared error of all its
                weights at each slope, that of storing nothing, and the squared norm of the base; see
                `tradeoff.tradeoff`.
            divergences: of each expert, what was measured; empty for an expert without prompts, whose divergence is
                then taken to be that of the others where the error is as large.
            laws: how the loss of each expert follows from squared error; empty for `LEFT_OUT` of all.
        """
        count, self.laws = len(SLOPES), laws or [LEFT_OUT] * len(tradeoffs)
        self._grid = np.linspace(0, count - 1, (count - 1) * _STEPS + 1)
        curves = [self._curve(tradeoff.numpy()) for tradeoff in tradeoffs]
        self._bits, self._left = (np.stack(rows) for rows in zip(*curves, strict=True))
        self._changes = np.asarray([_change_over_base(tradeoff) for tradeoff in tradeoffs])
        self._loss = self._predicted([law.loss for law in self.laws], self._left)
        if any(divergences):
            measured = [
                {int(self._places([slope])[0]): d for slope, d in ds.items()} for ds in divergences
            ]
            powers = [law.divergence_power for law in self.laws]
            self._loss = divergence_curves(self._left, measured, powers)

    @property
    def count(self) -> int:
        """The number of experts."""
        return len(self._bits)

    @property
    def least(self) -> float:
        """The least bits that all experts take together."""
        return float(self._bits[:, 0].sum())

    @property
    def most(self) -> float:
        """The bits of all experts at the finest slope, where the error that remains is negligible."""
        return float(self._bits[:, -1].sum())

    def left(self, bits: float) -> list[float]:
        """Predict the squared error of each expert, over its squared change.

        Args:
            bits: that all experts may take together.

        Returns:
            One part for each expert, in the order of the tradeoffs.
        """
        return self._of(self._left, self._within(bits))

    def kept_within(self, bits: float) -> list[float]:
        """Predict the part of its gain, in [0, 1], that each expert keeps within bits; see `left`."""
        left = self._at(self._left, self._within(bits))
        return _floats(self._predicted([law.kept for law in self.laws], left))

    def slopes(self, bits: float) -> list[float]:
        """Choose the slope of each expert.

        Args:
            bits: that all experts may take together.

        Returns:
            One slope for each expert, in squared error per stored number, in the order of the tradeoffs.

        Raises:
            ConfigError: the experts take more bits at every slope.
        """
        if bits < self.least:
            raise ConfigError(
                f"budget: {math.ceil(self.least / 8):,} bytes for experts required at least, "
                f"{int(bits / 8):,} are left"
            )
        return self._slopes(self._within(bits))

    def spent(self, slopes: Sequence[float]) -> float:
        """Predict the bits of all experts at the slopes of `slopes` or `slopes_to_keep`."""
        return math.fsum(self.bits(slopes))

    def bits(self, slopes: Sequence[float]) -> list[float]:
        """Predict the bits of each expert at its slope."""
        return self._of(self._bits, self._places(slopes))

    def kept(self, slopes: Sequence[float]) -> list[float]:
        """Predict the part of its gain, in [0, 1], that each expert keeps at its slope."""
        left = self._at(self._left, self._places(slopes))
        return _floats(self._predicted([law.kept for law in self.laws], left))

    def slopes_to_keep(self, keep: Sequence[float]) -> list[float]:
        """Choose for each expert the slope of the fewest bits at which it keeps a part of its gain.

        Args:
            keep: the part of each expert, in (0, 1), by the prediction of `kept`.

        Returns:
            One slope for each expert, in the order of the tradeoffs.
        """
        kept = self._predicted([law.kept for law in self.laws], self._left)
        enough = kept >= np.asarray(keep)[:, None]
        enough[:, -1] = True
        return self._slopes(enough.argmax(axis=1))

    def _predicted(self, predictions: Sequence[Prediction], left: Floats) -> Floats:
        """The prediction of each expert for its errors `[n_experts, n]`."""
        experts = zip(predictions, left, self._changes[:, None], strict=True)
        return np.stack([prediction(errors, change) for prediction, errors, change in experts])

    def _slopes(self, places: NDArray[np.int64]) -> list[float]:
        return [math.pow(2.0, -float(self._grid[i]) / 2) for i in places]

    def _places(self, slopes: Sequence[float]) -> NDArray[np.int64]:
        """The places in the grid of slopes that come from it."""
        places: NDArray[np.int64] = np.rint(-2 * _STEPS * np.log2(slopes)).astype(np.int64)
        return places

    def _curve(self, tradeoff: Floats) -> tuple[Floats, Floats]:
        """Bits and the part of the error on the finer grid; between two slopes their logarithms are nearly linear."""
        places = np.arange(len(SLOPES))
        bits, error, nothing, _ = tradeoff
        whole = max(float(nothing[0]), _SMALLEST)
        return (
            np.expm1(np.interp(self._grid, places, np.log1p(bits))),
            np.exp(np.interp(self._grid, places, np.log(np.maximum(error, _SMALLEST) / whole))),
        )

    def _within(self, bits: float) -> NDArray[np.int64]:
        """The place of each expert in the grid where the total loss within `bits` is least (Everett, 1963)."""
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

    def _of(self, rows: Floats, chosen: NDArray[np.int64]) -> list[float]:
        return _floats(self._at(rows, chosen))

    @staticmethod
    def _at(rows: Floats, chosen: NDArray[np.int64]) -> Floats:
        """The chosen place of each row, `[n_experts, 1]`."""
        return np.take_along_axis(rows, chosen[:, None], axis=1)


def _floats(column: Floats) -> list[float]:
    values: list[float] = column[:, 0].tolist()
    return values


def _change_over_base(tradeoff: Tensor) -> float:
    """The squared norm of an expert's change over that of the base; 0 where the base is not known."""
    change, base = tradeoff[2:, 0].tolist()
    return change / base if base else 0.0
