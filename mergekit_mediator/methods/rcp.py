"""RCP-Merging: a reasoning model, and of domain models the changes that do not harm it."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from mergekit.merge_methods.base import ParameterScope, ParameterSpec
from pydantic import Field
from torch import Tensor

from mergekit_mediator.errors import ConfigError
from mergekit_mediator.methods.prompt_method import PromptMethod, figures_of, prompt_spec
from mergekit_mediator.methods.task_vector_method import ModelWeight, UnreadWeight, shared

_PENALTY = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Rcp(PromptMethod):
    """Yang et al. (2025), arXiv 2508.03140, with the formulas of the authors' code.

    τ = τ_r + Σ_d m_d τ_d. A parameter of domain model d is kept, m_d = 1, if it wins the vote of most prompts. A
    prompt votes for it where ∂L/∂θ_d · θ_d + penalty · F (θ_r − θ_d)² ≤ 0. L is the mean negative log-likelihood of
    the answer. F is the mean over the reasoning model's prompts of (∂L/∂θ_r · θ_r)². The authors merge one
    domain model; that several are added is ours.

    The figures of a weight are m, `[experts, *shape]`, all 1 for the reasoning model.
    """

    reads = 3
    memory = 12  # the model, the penalty and the votes
    disk = 4
    disk_each = 1
    spec = prompt_spec(
        "rcp",
        "RCP-Merging",
        "https://arxiv.org/abs/2508.03140",
        ParameterSpec("reasoning", bool, ParameterScope.NON_BASE, default=False),
        shared("penalty", _PENALTY, 1.0),
    )

    def check(self, weights: Sequence[UnreadWeight]) -> None:
        """Refuse all but one reasoning model, the same one for all weights, and a penalty with filters."""
        for weight in weights:
            chosen = [m for m, reasons in weight.parameters["reasoning"].items() if reasons]
            if len(chosen) != 1:
                raise ConfigError(
                    f"reasoning: exactly one model with `reasoning: true` required, got {len(chosen)} for "
                    f"{weight.name}: set it in the parameters of the reasoning model"
                )
            if weight.parameters["reasoning"] != weights[0].parameters["reasoning"]:
                raise ConfigError(
                    "reasoning: one model for all weights required: leave out filters"
                )
            if weight.parameters["penalty"] != weights[0].parameters["penalty"]:
                raise ConfigError("penalty: one value for all weights required: leave out filters")

    def combine(self, weight: ModelWeight, parameters: Mapping[str, Any]) -> Tensor:
        """Add the kept changes `[*shape]` float32."""
        return (figures_of(parameters, weight.name, weight.taus) * weight.taus).sum(dim=0)


def votes(gradient: Tensor, weight: Tensor, penalty: Tensor) -> Tensor:
    """Vote on each parameter of a domain model, by one prompt.

    Args:
        gradient: ∂L/∂θ_d, of any shape.
        weight: θ_d.
        penalty: penalty · F (θ_r − θ_d)².

    Returns:
        1 for parameters to keep, else -1, float32.
    """
    return torch.where(gradient * weight + penalty <= 0, 1.0, -1.0)
