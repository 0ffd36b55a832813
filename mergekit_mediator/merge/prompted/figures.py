"""The figures of methods that need the models' answers to prompts; see `methods.prompt_method`."""

from collections.abc import Callable, Mapping

from mergekit_mediator.merge.prompted.coefficients import aligned_coefficients
from mergekit_mediator.merge.prompted.gradient_figures import fisher_information, rcp_votes
from mergekit_mediator.merge.prompted.models import PromptedModels
from mergekit_mediator.merge.prompted.regression_means import regression_means
from mergekit_mediator.methods.expert_merging import ExpertMerging
from mergekit_mediator.methods.fisher import Fisher
from mergekit_mediator.methods.prompt_method import Figures
from mergekit_mediator.methods.rcp import Rcp
from mergekit_mediator.methods.regmean_pp import RegmeanPp

METHODS: Mapping[str, Callable[[PromptedModels], Figures]] = {
    ExpertMerging.spec.name: aligned_coefficients,
    Fisher.spec.name: fisher_information,
    Rcp.spec.name: rcp_votes,
    RegmeanPp.spec.name: regression_means,
}


def measure(method: str, models: PromptedModels) -> Figures:
    """Measure the figures of a method by its name.

    Args:
        method: one of `METHODS`.
        models: of the merge.

    Raises:
        ArtifactError: transformers cannot load the base model.
        InputError: a model lacks a weight, or has it in another shape than the base.
    """
    return METHODS[method](models)
