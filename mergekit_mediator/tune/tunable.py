"""The numbers of a stored weight that a fit may move without more bytes, and how the model's weight follows them.

A fit may move the scales and codes of factors, and vectors. The weight is computed from rounded codes. Gradients
pass through the rounding as if there were none (the straight-through estimator, Bengio, Léonard and Courville,
arXiv 1308.3432).
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from mergekit_mediator.delta.approximate import approximate, as_matrix, is_vector
from mergekit_mediator.delta.factors import Factors, unrounded
from mergekit_mediator.delta.stored_weight import StoredWeight

# Learning rates: of the relative change of scales and vectors, and of codes in steps. Both were tuned on prompts that
# no table reports; no results file holds that search.
SCALE_RATE, CODE_RATE = 0.01, 0.002


class Tunable(Protocol):
    """One stored weight of an expert, in a model that holds the stored form of the expert.

    Attributes:
        weight: the model's weight, float32, which `apply` computes from the parameters.
    """

    weight: Tensor

    def parameters(self) -> Iterator[tuple[float, nn.Parameter]]:
        """Yield each parameter with its learning rate."""
        ...

    def add_gradient(self, gradient: Tensor) -> None:
        """Add to the gradients of the parameters, given the gradient of the weight in the weight's shape."""
        ...

    def apply(self) -> None:
        """Compute the weight from the parameters."""
        ...

    def result(self) -> StoredWeight:
        """Make the stored weight of the parameters."""
        ...


def tunable(
    weight: Tensor,
    stored: StoredWeight,
    change: Tensor,
    scale_rate: float = SCALE_RATE,
    code_rate: float = CODE_RATE,
) -> Tunable | None:
    """Make the tunable part of a stored weight.

    Args:
        weight: of the model, float32, which holds the stored form of the expert.
        stored: of the expert. With a share w in the dense weight, a change of it counts 1 − w; see
            `StoredWeight.coefficient`.
        change: of the expert from the base, float32, of the same shape. Its unrounded codes are where the
            codes start.
        scale_rate: learning rate of the relative change of scales and vectors.
        code_rate: learning rate of codes, in steps.

    Returns:
        The tunable part. None if the weight has neither factors nor a stored vector, if what is stored is exact, or is
        signs, whose noise a few factors do not take away, or if the dense weight holds the expert in full.
    """
    if stored.share >= 1 or stored.values in ("exact", "random_sign"):
        return None
    if stored.factors:
        rates = scale_rate, code_rate
        return _TunableFactors(weight, stored, stored.factors, change, rates)
    if is_vector(weight) and stored.positions.numel():
        return _TunableVector(weight, stored, scale_rate)
    return None


class _TunableFactors:
    """The codes of a low-rank part, and the relative changes of its scales."""

    def __init__(
        self,
        weight: Tensor,
        stored: StoredWeight,
        factors: Factors,
        change: Tensor,
        rates: tuple[float, float],
    ) -> None:
        self.weight, self._stored, self._factors = weight, stored, factors
        self._scale_rate, self._code_rate = rates
        self._scales = factors.scales.to(weight) * (1 - stored.share)
        self._offsets = nn.Parameter(torch.zeros_like(self._scales))
        sides = unrounded(as_matrix(change), factors)
        self._left, self._right = (nn.Parameter(side) for side in sides)
        self._left_rounded, self._right_rounded = factors.left.to(weight), factors.right.to(weight)
        # Codes of a column that fit half a byte stay there.
        both = torch.cat([self._left_rounded, self._right_rounded])
        self._lowest, self._highest = both.amin(0), both.amax(0)
        self._scaled = self._scales

    def parameters(self) -> Iterator[tuple[float, nn.Parameter]]:
        yield self._scale_rate, self._offsets
        yield self._code_rate, self._left
        yield self._code_rate, self._right

    def add_gradient(self, gradient: Tensor) -> None:
        gradient = as_matrix(gradient)
        right = gradient.T @ self._left_rounded
        _add(self._offsets, (right * self._right_rounded).sum(0) * self._scales)
        _add(self._right, right * self._scaled)
        _add(self._left, gradient @ self._right_rounded * self._scaled)

    def apply(self) -> None:
        scaled = self._scales * (1 + self._offsets.detach())
        left, right = self._rounded(self._left), self._rounded(self._right)
        lefts = torch.cat([left * scaled, self._left_rounded * -self._scaled], dim=1)
        as_matrix(self.weight).addmm_(lefts, torch.cat([right, self._right_rounded], dim=1).T)
        self._scaled, self._left_rounded, self._right_rounded = scaled, left, right

    def result(self) -> StoredWeight:
        scales = self._factors.scales * (1 + self._offsets.detach().cpu())
        left, right = (
            side.to("cpu", self._factors.left.dtype)
            for side in (self._left_rounded, self._right_rounded)
        )
        return replace(self._stored, factors=Factors(left, right, scales))

    def _rounded(self, side: Tensor) -> Tensor:
        return side.detach().round().clamp(self._lowest, self._highest)


class _TunableVector:
    """The numbers of a vector, in units of the root mean square of its change."""

    def __init__(self, weight: Tensor, stored: StoredWeight, rate: float) -> None:
        self.weight, self._stored, self._rate = weight, stored, rate
        self._change = stored.difference(torch.zeros(stored.positions.numel()))
        self._unit = float(self._change.square().mean().sqrt()) * (1 - stored.share)
        self._offsets = nn.Parameter(weight.new_zeros(weight.numel()))
        self._applied = weight.new_zeros(weight.numel())

    def parameters(self) -> Iterator[tuple[float, nn.Parameter]]:
        yield self._rate, self._offsets

    def add_gradient(self, gradient: Tensor) -> None:
        _add(self._offsets, gradient.reshape(-1) * self._unit)

    def apply(self) -> None:
        moved = self._offsets.detach().clone()
        self.weight.view(-1).add_(moved - self._applied, alpha=self._unit)
        self._applied = moved

    def result(self) -> StoredWeight:
        old = self._stored
        change = self._offsets.detach().cpu() * (self._unit / (1 - old.share))
        change.index_add_(0, old.positions, self._change)
        return approximate(change.view(old.shape), 1.0, old.dtype, old.share)


def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
