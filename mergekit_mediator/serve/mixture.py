"""Mixtures: the weight of each expert in a request, checked once where the request comes in."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

from mergekit_mediator.errors import MixtureError

DENSE_NAME = "dense"


@dataclass(frozen=True)
class Mixture:
    """The weights of a mixture's experts: W_dense + Σ_t p_t Δ_t.

    Attributes:
        weights: name and weight p > 0 of each expert, in the artifact's order; the dense expert has none.
    """

    weights: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, named: "Named", experts: Sequence[str]) -> "Mixture":
        """Make the mixture that a name or weights stand for.

        Args:
            named: an expert's name, `dense` (unless an expert has that name), or weights by expert.
            experts: the artifact's experts, in its order.

        Raises:
            MixtureError: an expert is unknown, a weight is negative or not finite, or all weights are
                zero.
        """
        if isinstance(named, Mixture):
            return named
        if isinstance(named, str):
            named = {} if named == DENSE_NAME and named not in experts else {named: 1.0}
        if not isinstance(named, Mapping):
            raise MixtureError(
                f"mixture: an expert's name or weights by expert are required, got {named!r}: give "
                f"for example {{{experts[0]!r}: 1.0}}"
            )
        for name, weight in named.items():
            if name not in experts:
                raise MixtureError(f"unknown expert {name!r}; this model has {', '.join(experts)}")
            if isinstance(weight, bool) or not isinstance(weight, Real):
                raise MixtureError(f"expert {name!r}: weight must be a number, got {weight!r}")
            if not math.isfinite(weight) or weight < 0:
                raise MixtureError(
                    f"expert {name!r}: weight must be finite and at least 0, got {weight}"
                )
        mixture = cls.of_row([float(named.get(name, 0)) for name in experts], experts)
        if named and mixture.is_dense:
            raise MixtureError(
                "mixture: at least one weight above 0 is required, got only zeros: give no weights "
                "for the dense expert"
            )
        return mixture

    @classmethod
    def of_row(cls, row: Sequence[float], experts: Sequence[str]) -> "Mixture":
        """Make a mixture from one row of a policy's result: a weight of at least 0 for each expert."""
        return cls(tuple((name, p) for name, p in zip(experts, row, strict=True) if p > 0))

    @property
    def is_dense(self) -> bool:
        """Whether the mixture is the dense expert alone."""
        return not self.weights

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the mixture's experts."""
        return tuple(name for name, _ in self.weights)

    @property
    def total(self) -> float:
        """The sum of the weights, Σ_t p_t."""
        return sum(p for _, p in self.weights)

    @property
    def alone(self) -> str | None:
        """The name of the only expert, if the mixture has one expert and its weight is 1; else None."""
        if len(self.weights) == 1 and self.weights[0][1] == 1.0:
            return self.weights[0][0]
        return None

    def weight(self, name: str) -> float:
        """Return the weight of an expert; 0 if the mixture does not have it."""
        return next((p for expert, p in self.weights if expert == name), 0.0)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __str__(self) -> str:
        return " + ".join(f"{p:g} {name}" for name, p in self.weights) or "the dense expert"


DENSE = Mixture()
# An expert's name, `dense`, weights by expert, or a mixture.
Named = str | Mapping[str, float] | Mixture
