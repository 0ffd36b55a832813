"""`merge_method: twin_merging` and `reversible`: merges by `mediator` with the settings of these methods."""

from collections.abc import Mapping
from typing import Any

from mergekit.config import MergeConfiguration

from mergekit_mediator.merge.parameters import check_known, shared_parameters, sources
from mergekit_mediator.methods.mediator import METHOD as MEDIATOR

TWIN_MERGING, REVERSIBLE = "twin_merging", "reversible"
# By method, the parameters of `mediator`; a configuration may give another rank.
_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    TWIN_MERGING: {"route": "all", "rank": 16},
    REVERSIBLE: {"route": "all", "rank": 64, "basis": "shared"},
}
# The methods that write an artifact.
ARTIFACTS = (MEDIATOR, *_SETTINGS)


def as_mediator(config: MergeConfiguration) -> MergeConfiguration:
    """Turn a configuration of a low-rank method into one of `mediator`, and leave any other as it is.

    Twin-Merging (Lu et al., 2024, arXiv 2406.15479) has a shared model and, for each expert, the leading singular
    triples of its difference from it, which a router weighs for each input. Reversible model merging (Alipour and
    Amiri, 2025, arXiv 2510.14163) has one basis for all experts, and coefficients for each; see `methods.shared_basis`.
    In both the shared model is the dense expert, the weighted mean in all layers, and the routers are those of
    `mediator`.

    Args:
        config: of any merge method.

    Raises:
        ConfigError: a parameter is not one of the method.
    """
    if config.merge_method not in _SETTINGS:
        return config
    for where, parameters in shared_parameters(config):
        for name in parameters:
            check_known(name, where, {"rank", "weight"})
    for model, parameters in sources(config):
        for name in parameters:
            check_known(name, f"model {model}", {"expert", "weight"})
    settings = {**_SETTINGS[config.merge_method], **(config.parameters or {})}
    return config.model_copy(update={"merge_method": MEDIATOR, "parameters": settings})
