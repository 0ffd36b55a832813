"""The figures of methods with prompts, on disk until the merge ends."""

import torch
from torch import Tensor

from mergekit_mediator.merge.scratch import Scratch


class FiguresOfExperts:
    """Figures of each weight and each expert."""

    def __init__(self, experts: int) -> None:
        """Start without figures, for a number of experts."""
        self._experts, self._scratch = range(experts), Scratch()

    def put(self, expert: int, weight: str, figures: Tensor) -> None:
        """Store the figures `[*shape]` of the weight of one expert, by its number."""
        self._scratch[f"{expert}/{weight}"] = figures

    def of(self, weight: str) -> Tensor:
        """Read the figures of one weight of all experts, `[experts, *shape]` float32."""
        return torch.stack([self._scratch[f"{e}/{weight}"].float() for e in self._experts])


class FiguresOfWeights:
    """Figures of each weight, which all experts share."""

    def __init__(self) -> None:
        """Start without figures."""
        self._scratch = Scratch()

    def put(self, weight: str, figures: Tensor) -> None:
        """Store the figures of one weight."""
        self._scratch[weight] = figures

    def of(self, weight: str) -> Tensor:
        """Read the figures of one weight, float32."""
        return self._scratch[weight].float()
