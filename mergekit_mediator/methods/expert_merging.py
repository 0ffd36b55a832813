"""Expert Merging: coefficients of each layer that bring hidden states and logits nearest to each expert's."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from mergekit_mediator.errors import ConfigError
from mergekit_mediator.methods.prompt_method import PromptMethod, figures_of, prompt_spec
from mergekit_mediator.methods.task_vector_method import ModelWeight, UnreadWeight, shared

_STEPS = 40
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ExpertMerging(PromptMethod):
    """Zhang et al. (2025), arXiv 2509.25712: τ = Σ_t c_lt τ_t with a coefficient for each layer l and expert t.

    The abstract names the alignment of hidden states and logits and a regulariser of coefficients. Their form is
    ours; see `merge.prompted.coefficients`.

    The figures of a weight are c, `[experts]`.
    """

    reads = 4  # and twice in every step
    memory = 4
    spec = prompt_spec(
        "expert_merging",
        "Expert Merging",
        "https://arxiv.org/abs/2509.25712",
        shared("steps", Annotated[int, Field(ge=1)], _STEPS),
        shared("rate", _Positive, 0.02),
        shared("hidden", _NotNegative, 1.0),
        shared("penalty", _NotNegative, 0.1),
    )

    @classmethod
    def times_read(cls, parameters: Mapping[str, Any]) -> int:
        """Count how often all models are read, with the merge itself."""
        steps = parameters.get("steps", _STEPS)
        return cls.reads + 2 * (steps if isinstance(steps, int) else _STEPS)

    def check(self, weights: Sequence[UnreadWeight]) -> None:
        """Refuse filters and gradients: one training has one value of each parameter."""
        for name in ("steps", "rate", "hidden", "penalty"):
            values = {weight.parameters[name] for weight in weights}
            if len(values) > 1:
                raise ConfigError(
                    f"{name}: one value for all weights required, got {min(values)} and {max(values)}: leave out "
                    "filters and gradients"
                )

    def combine(self, weight: ModelWeight, parameters: Mapping[str, Any]) -> Tensor:
        """Sum the task vectors `[*shape]` float32 with the coefficients of their layer."""
        coefficients = figures_of(parameters, weight.name, weight.taus)
        return (coefficients.view(-1, *[1] * weight.base.ndim) * weight.taus).sum(dim=0)
