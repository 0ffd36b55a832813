"""A sample of numbers that is rounded in steps of many sizes: it is sorted once, and every step costs a search."""

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mergekit_mediator.delta.approximate import DEAD_ZONE


class Sample:
    """Numbers that are rounded to multiples of a step, as `approximate.quantise_steps` does.

    The codes of sorted numbers ascend, so that a search for the few places where the code changes replaces
    a pass over all numbers.

    Attributes:
        largest: the largest magnitude.
        mean_square: of the numbers.
    """

    def __init__(self, numbers: Tensor) -> None:
        """Sort a sample.

        Args:
            numbers: float32 on the CPU, any shape, at least one.
        """
        self._sorted = np.sort(numbers.numpy().reshape(-1))
        self.largest = float(max(-self._sorted[0], self._sorted[-1]))
        self.mean_square = float(np.square(self._sorted, dtype=np.float64).mean())

    def rounded(self, step: float) -> tuple[float, float]:
        """Round all numbers to multiples of a step.

        Args:
            step: greater than 0.

        Returns:
            The entropy of the codes in bits per number, and the mean squared error.
        """
        count = math.floor(self.largest / step + 1 - DEAD_ZONE)
        edges = step * (np.arange(1, count + 1) - 1 + DEAD_ZONE)
        places = np.searchsorted(
            self._sorted, np.concatenate([-edges[::-1], edges]).astype(np.float32)
        )
        codes = np.arange(-count, count + 1)
        starts = np.concatenate([[0], places])
        numbers = np.diff(starts, append=self._sorted.size)
        used = numbers > 0
        codes, numbers, starts = codes[used], numbers[used], starts[used]
        sums = np.add.reduceat(self._sorted, starts, dtype=np.float64)
        # Σ (x − c·step)² of each code c, over all numbers
        crossed = step * np.dot(codes, step * codes * numbers - 2 * sums)
        error = max(0.0, self.mean_square + float(crossed) / self._sorted.size)
        return entropy(numbers), error


def entropy(counts: NDArray[np.int64]) -> float:
    """Compute the entropy in bits per symbol of symbols that occur so many times, each at least once."""
    p = counts / counts.sum()
    return -math.fsum((p * np.log2(p)).tolist())
