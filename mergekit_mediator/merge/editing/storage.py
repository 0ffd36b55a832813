"""The form in which an added expert is stored."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_mediator.delta.value_forms import RateForm
from mergekit_mediator.errors import EditError
from mergekit_mediator.merge.config import MediatorConfig
from mergekit_mediator.merge.editing.workspace import Workspace
from mergekit_mediator.merge.loaders import OpenInputs

_OF_BASE = ("keep", "bits", "budget")
_OF_DENSE = ("density", "values", "rank")


class AddedInputs(OpenInputs):
    """The base and the model of an expert that is added to an artifact."""

    @staticmethod
    def _parameters(merge_config: MergeConfiguration) -> MediatorConfig:
        return MediatorConfig.of_added_expert(merge_config)


def model_of(source: str, base: str) -> str:
    """Give the model that a command names: an adapter alone is an adapter of the base."""
    path = Path(source)
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        return f"{base}+{source}"
    return source


def storage(work: Workspace, given: Mapping[str, Any]) -> dict[str, Any]:
    """Choose the parameters by which an added expert is stored.

    Args:
        work: the artifact.
        given: those of `keep`, `bits`, `budget`, `density`, `values` and `rank` that the user gives.

    Returns:
        The given parameters, or those of the merge. A `budget` of the merge is spent; its experts' mean rate takes
        its place. Empty if experts are adapters that keep their own factors.

    Raises:
        EditError: the experts of the artifact are stored relative to the other reference.
    """
    parameters = work.manifest.parameters
    is_of_both = parameters.get("reference", "mean") != "mean"
    # random signs are relative to the dense expert at every rate
    values = given.get("values", parameters.get("values"))
    is_signs = values == "random_sign"
    of_rate = {"values": values} if values in get_args(RateForm) and "rank" not in given else {}
    for name in given:
        if name in _OF_DENSE and work.is_relative_to_base and not is_of_both:
            raise EditError(
                f"{name}: the experts of this artifact are stored relative to the base, and {name} is relative "
                "to the dense expert: give --bits or --budget"
            )
        if name in _OF_BASE and not (work.is_relative_to_base or is_signs):
            raise EditError(
                f"{name}: the experts of this artifact are stored relative to the dense expert, and {name} is "
                "relative to the base: give --density or --rank"
            )
    names = [name for name in ("density", "values") if name in parameters]
    of_density: dict[str, Any] = {name: parameters[name] for name in names}
    if given:
        return {**(of_density if set(given) <= {"density", "values"} else of_rate), **given}
    for name in ("keep", "bits", "rank"):
        if name in parameters:
            return {name: parameters[name], **of_rate}
    if "budget" in parameters:
        rates = [work.bits_per_parameter(name) for name in work.manifest.expert_names]
        return {"bits": sum(rates) / len(rates), **of_rate}
    if any(d.factors for file in work.files.values() for d in file.weights.values()):
        return {}
    return of_density


def merge_configuration(
    base: str, model: str, name: str, parameters: Mapping[str, Any]
) -> MergeConfiguration:
    """Make the configuration of a merge of the base and the added expert alone."""
    return MergeConfiguration(
        merge_method="mediator",
        base_model=ModelReference.parse(base),
        models=[{"model": model, "parameters": {"expert": name}}],
        parameters=dict(parameters),
    )
