"""A mixture: how much of each expert a request gets. Made and checked once, where a request comes in."""

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
        weights: name and weight p of each expert, above 0, in the artifact's order; empty is the dense
            expert.
    """

    weights: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, named: "Named", experts: Sequence[str]) -> "Mixture":
        """The mixture that a name or weights stand for.

        Args:
            named: an expert's name, `dense` (unless an expert is called so), or weights by expert.
            experts: the artifact's, in its order.

        Raises:
            MixtureError: an unknown expert, a weight that is negative or not finite, or weights that
                are all zero.
        """
        if isinstance(named, Mixture):
            return named
        if isinstance(named, str):
            named = {} if named == DENSE_NAME and named not in experts else {named: 1.0}
        if not isinstance(named, Mapping):
            raise MixtureError(
                f"a mixture is an expert's name or weights by expert, got {named!r}: give such as "
                f"{{{experts[0]!r}: 1.0}}"
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
            raise MixtureError("a mixture needs one weight above 0; for the dense expert give none")
        return mixture

    @classmethod
    def of_row(cls, row: Sequence[float], experts: Sequence[str]) -> "Mixture":
        """The mixture of one row of a policy's result: a weight for each expert, at least 0."""
        return cls(tuple((name, p) for name, p in zip(experts, row, strict=True) if p > 0))

    @property
    def is_dense(self) -> bool:
        """Whether it is the dense expert alone."""
        return not self.weights

    @property
    def names(self) -> tuple[str, ...]:
        """Its experts."""
        return tuple(name for name, _ in self.weights)

    @property
    def total(self) -> float:
        """Σ_t p_t."""
        return sum(p for _, p in self.weights)

    @property
    def alone(self) -> str | None:
        """The name of its only expert, if there is one with weight 1."""
        if len(self.weights) == 1 and self.weights[0][1] == 1.0:
            return self.weights[0][0]
        return None

    def weight(self, name: str) -> float:
        """The weight of an expert, 0 if it is not in the mixture."""
        return next((p for expert, p in self.weights if expert == name), 0.0)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __str__(self) -> str:
        return " + ".join(f"{p:g} {name}" for name, p in self.weights) or "the dense expert"


DENSE = Mixture()
# An expert's name, `dense`, weights by expert, or a mixture.
Named = str | Mapping[str, float] | Mixture
