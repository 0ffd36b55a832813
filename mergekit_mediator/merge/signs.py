"""At which coordinates experts changed a weight, and in which directions."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergekit_mediator.delta.chunks import CHUNK, chunks
from mergekit_mediator.delta.kth_largest import compare


class Signs:
    """A byte for each coordinate: a positive change, a negative change, changes of two experts."""

    def __init__(self, numel: int, device: str | torch.device) -> None:
        """Start without changes."""
        self._positive, self._negative, self._twice = torch.zeros(
            3, numel, dtype=torch.bool, device=device
        )

    def note(self, tau: Tensor, threshold: float) -> None:
        """Note the changes of one more expert.

        Args:
            tau: the task vector, `[numel]` float32 on the device.
            threshold: the smallest magnitude that counts as a change, above 0.
        """
        positive, negative = tau >= threshold, tau <= -threshold
        self._twice |= (self._positive | self._negative) & (positive | negative)
        self._positive |= positive
        self._negative |= negative

    def counts(self) -> tuple[int, int]:
        """Count the coordinates that two experts changed, and those that two changed in opposite directions."""
        return int(self._twice.sum()), int((self._positive & self._negative).sum())


class PackedSigns:
    """The same on a CPU, a bit for each coordinate."""

    def __init__(self, numel: int) -> None:
        """Start without changes."""
        self._positive, self._negative, self._twice = np.zeros((3, -(-numel // 8)), dtype=np.uint8)

    def note(self, tau: Tensor, threshold: float) -> None:
        """See `Signs.note`."""
        for part in chunks(tau.numel()):
            packed = slice(part.start // 8, -(-part.stop // 8))
            positive = np.packbits(compare(tau[part], threshold, np.greater_equal).numpy())
            negative = np.packbits(compare(tau[part], -threshold, np.less_equal).numpy())
            changed = self._positive[packed] | self._negative[packed]
            self._twice[packed] |= changed & (positive | negative)
            self._positive[packed] |= positive
            self._negative[packed] |= negative

    def counts(self) -> tuple[int, int]:
        """See `Signs.counts`."""
        return _ones(self._twice), _ones(self._positive & self._negative)


def _ones(packed: NDArray[np.uint8]) -> int:
    """Count the bits that are set."""
    parts = (packed[i : i + CHUNK] for i in range(0, packed.size, CHUNK))
    return sum(int(np.count_nonzero(np.unpackbits(part))) for part in parts)
