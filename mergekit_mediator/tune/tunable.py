"""What can be moved of a stored weight in as many bytes, and how the weight follows.

Scales and codes of factors, and vectors, can be moved. Codes are rounded wherever the weight is made of
them, and gradients pass through the rounding as if there were none (the straight-through estimator, Bengio,
Léonard and Courville, arXiv 1308.3432).
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from mergekit_mediator.delta.approximate import approximate, as_matrix, is_vector
from mergekit_mediator.delta.factors import Factors, unrounded
from mergekit_mediator.delta.stored_weight import StoredWeight

# Found on prompts that are not reported: of a relative change of scales and vectors, and of codes in steps.
SCALE_RATE, CODE_RATE = 0.01, 0.002


class Tunable(Protocol):
    """One stored weight of an expert, in a model that is served as it.

    Attributes:
        weight: the model's, which `apply` brings to where the parameters are.
    """

    weight: Tensor

    def parameters(self) -> Iterator[tuple[float, nn.Parameter]]:
        """What is moved, with the rate at which it is."""
        ...

    def add_gradient(self, gradient: Tensor) -> None:
        """Add to the gradients of the parameters, given that of the weight."""
        ...

    def apply(self) -> None:
        """Bring the weight to where the parameters are."""
        ...

    def result(self) -> StoredWeight:
        """What is stored of the weight now."""
        ...


def tunable(weight: Tensor, stored: StoredWeight, change: Tensor) -> Tunable | None:
    """What can be moved of a stored weight; None if nothing is stored of it, or it is the dense weight.

    Args:
        weight: of the model, float32, holding what is served as the expert.
        stored: of the expert. With a share w in the dense weight a change of it counts 1 − w; see
            `StoredWeight.coefficient`.
        change: of the expert from the base in full, float32 of the same shape: from where codes were rounded.
    """
    if stored.share >= 1:
        return None
    if stored.factors:
        return _TunableFactors(weight, stored, stored.factors, change)
    if is_vector(weight) and stored.positions.numel():
        return _TunableVector(weight, stored)
    return None


class _TunableFactors:
    """The scales of a low-rank part, relative to themselves, and its codes."""

    def __init__(
        self, weight: Tensor, stored: StoredWeight, factors: Factors, change: Tensor
    ) -> None:
        self.weight, self._stored, self._factors = weight, stored, factors
        self._scales = factors.scales.to(weight) * (1 - stored.share)
        self._moved = nn.Parameter(torch.zeros_like(self._scales))
        sides = unrounded(as_matrix(change), factors)
        self._left, self._right = (nn.Parameter(side) for side in sides)
        self._left_rounded, self._right_rounded = factors.left.to(weight), factors.right.to(weight)
        # what is stored in half a byte stays there
        both = torch.cat([self._left_rounded, self._right_rounded])
        self._lowest, self._highest = both.amin(0), both.amax(0)
        self._scaled = self._scales

    def parameters(self) -> Iterator[tuple[float, nn.Parameter]]:
        yield SCALE_RATE, self._moved
        yield CODE_RATE, self._left
        yield CODE_RATE, self._right

    def add_gradient(self, gradient: Tensor) -> None:
        gradient = as_matrix(gradient)
        right = gradient.T @ self._left_rounded
        _add(self._moved, (right * self._right_rounded).sum(0) * self._scales)
        _add(self._right, right * self._scaled)
        _add(self._left, gradient @ self._right_rounded * self._scaled)

    def apply(self) -> None:
        scaled = self._scales * (1 + self._moved.detach())
        left, right = self._rounded(self._left), self._rounded(self._right)
        lefts = torch.cat([left * scaled, self._left_rounded * -self._scaled], dim=1)
        as_matrix(self.weight).addmm_(lefts, torch.cat([right, self._right_rounded], dim=1).T)
        self._scaled, self._left_rounded, self._right_rounded = scaled, left, right

    def result(self) -> StoredWeight:
        scales = self._factors.scales * (1 + self._moved.detach().cpu())
        left, right = (
            side.to("cpu", self._factors.left.dtype)
            for side in (self._left_rounded, self._right_rounded)
        )
        return replace(self._stored, factors=Factors(left, right, scales))

    def _rounded(self, side: Tensor) -> Tensor:
        return side.detach().round().clamp(self._lowest, self._highest)


class _TunableVector:
    """The numbers of a vector, in units of the root mean square of its change."""

    def __init__(self, weight: Tensor, stored: StoredWeight) -> None:
        self.weight, self._stored = weight, stored
        self._change = stored.difference(torch.zeros(stored.positions.numel()))
        self._unit = float(self._change.square().mean().sqrt()) * (1 - stored.share)
        self._moved = nn.Parameter(weight.new_zeros(weight.numel()))
        self._applied = weight.new_zeros(weight.numel())

    def parameters(self) -> Iterator[tuple[float, nn.Parameter]]:
        yield SCALE_RATE, self._moved

    def add_gradient(self, gradient: Tensor) -> None:
        _add(self._moved, gradient.reshape(-1) * self._unit)

    def apply(self) -> None:
        moved = self._moved.detach().clone()
        self.weight.view(-1).add_(moved - self._applied, alpha=self._unit)
        self._applied = moved

    def result(self) -> StoredWeight:
        old = self._stored
        change = self._moved.detach().cpu() * (self._unit / (1 - old.share))
        change.index_add_(0, old.positions, self._change)
        return approximate(change.view(old.shape), 1.0, old.dtype, old.share)


def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
