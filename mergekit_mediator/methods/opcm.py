"""`opcm`: one task vector after the other, each without what would disturb those before it."""

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from mergekit_mediator.errors import ConfigError
from mergekit_mediator.methods.singular import leading_triples
from mergekit_mediator.methods.task_vector_method import (
    ModelWeight,
    UnreadWeight,
    shared,
    task_vector_spec,
)
from mergekit_mediator.methods.whole_model import FIGURES, ModelWeights, WholeModelMethod


@dataclass(frozen=True)
class Scale:
    """Figures of all weights.

    Attributes:
        factor: by which the sum is multiplied, so that its norm is the mean norm of the experts' task vectors.
        sums: the sums by name, where a place outside of memory keeps them; each is taken out once.
    """

    factor: float
    sums: MutableMapping[str, Tensor] | None


class Opcm(WholeModelMethod):
    """OPCM: Tang et al., "Merging Models on the Fly Without Retraining" (2025), algorithm 1.

    With the sum of the task vectors before τ_t as U diag(σ) Vᵀ, and k the number of leading singular values that
    hold the part `alpha` of Σσ, τ_t loses its component in the leading k by k block of U, V and on the rest of
    their diagonal, and is added to the sum. The authors scale after every expert, which the next one undoes: at
    the end the sum gets the mean norm of all task vectors, over the whole model. Weights that are no matrices
    are added as they are. The result depends on the order of the experts.
    """

    spec = task_vector_spec(
        "opcm",
        "OPCM",
        "https://arxiv.org/abs/2501.09522",
        shared("alpha", Annotated[float, Field(ge=0, lt=1)], 0.5),
    )

    def check(self, weights: Sequence[UnreadWeight]) -> None:
        """Refuse experts whose weights differ."""
        super().check(weights)
        for weight in weights:
            values = sorted(set(weight.parameters["weight"].values()))
            if len(values) > 1:
                raise ConfigError(
                    f"weight: the same for all experts required, as opcm scales their sum, got {values[0]} and "
                    f"{values[-1]} for {weight.name}: leave `weight` out, and put first what matters most"
                )

    def measure(self, weights: ModelWeights, parameters: Mapping[str, Any]) -> Scale:
        """The factor of the sum; the sums are kept where there is a place for them."""
        squares: Tensor | None = None
        of_sum = 0.0
        for weight, of_weight in weights:
            own = weight.taus.flatten(1).norm(dim=1).double().cpu().square()
            squares = own if squares is None else squares + own
            total = projected_sum(weight, of_weight["alpha"])
            of_sum += float(total.norm()) ** 2
            if weights.scratch is not None:
                weights.scratch[weight.name] = total
        mean = 0.0 if squares is None else float(squares.sqrt().mean())
        return Scale(mean / math.sqrt(of_sum) if of_sum else 0.0, weights.scratch)

    def combine(self, weight: ModelWeight, parameters: Mapping[str, Any]) -> Tensor:
        """See the class."""
        scale: Scale = parameters[FIGURES]
        if scale.sums is None:
            return projected_sum(weight, parameters["alpha"]).mul_(scale.factor)
        return scale.sums.pop(weight.name).to(weight.taus.device).mul_(scale.factor)


def projected_sum(weight: ModelWeight, alpha: float) -> Tensor:
    """The sum of all task vectors, each without what disturbs those before it, `[*shape]` float32."""
    if not weight.is_matrix:
        return weight.taus.sum(dim=0)
    total = weight.taus[0].clone()
    for tau in weight.taus[1:]:
        total += undisturbing(tau, total, alpha)
    return total


def undisturbing(tau: Tensor, total: Tensor, alpha: float) -> Tensor:
    """A task vector without its component in the directions that matter to a sum of others.

    Args:
        tau: `[m, n]` float32.
        total: the sum, `[m, n]` float32.
        alpha: the part of the sum's singular values whose whole block is taken out.

    Returns:
        `[m, n]` float32.
    """
    left, values, right = leading_triples(total, min(total.shape))
    if not bool(values.any()):
        return tau
    leading = int((values.cumsum(dim=0) > alpha * values.sum()).int().argmax())
    component = left.mT @ tau @ right
    rest = component.diagonal().clone() * (values > 0)
    rest[:leading] = 0
    removed = left[:, :leading] @ component[:leading, :leading] @ right[:, :leading].mT
    return tau - removed - (left * rest) @ right.mT
