"""Fisher merging: each parameter mostly from the experts whose answers depend on it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mergekit_mediator.methods.prompt_method import PromptMethod, figures_of, prompt_spec
from mergekit_mediator.methods.task_vector_method import ModelWeight

# A parameter on which no answer depends gets the mean of the task vectors.
_LEAST = 1e-6


class Fisher(PromptMethod):
    """Matena and Raffel (2021), arXiv 2111.09832, with the Fisher information of each expert divided by its norm.

    τ = Σ_t (F_t + ε) τ_t / Σ_t (F_t + ε). F_t is the mean over the prompts of the squared gradients of the
    log-likelihood of the expert's own answer, divided by its root mean square over the whole model: so do
    Tang et al. in fusion_bench.

    The figures of a weight are F_t, `[experts, *shape]`.
    """

    reads = 2
    memory = 8  # the model, and the sums of squares
    disk_each = 4
    spec = prompt_spec("fisher", "Fisher merging", "https://arxiv.org/abs/2111.09832")

    def combine(self, weight: ModelWeight, parameters: Mapping[str, Any]) -> Tensor:
        """Average the task vectors `[*shape]` float32, weighted by Fisher information."""
        information = figures_of(parameters, weight.name, weight.taus) + _LEAST
        return (information * weight.taus).sum(dim=0) / information.sum(dim=0)
