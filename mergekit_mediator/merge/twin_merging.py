"""`merge_method: twin_merging`: a merge by `mediator` with the settings of Twin-Merging."""

from mergekit.config import MergeConfiguration

from mergekit_mediator.merge.parameters import check_known, shared_parameters, sources
from mergekit_mediator.methods.mediator import METHOD as MEDIATOR

METHOD = "twin_merging"
_DEFAULT_RANK = 16


def as_mediator(config: MergeConfiguration) -> MergeConfiguration:
    """Turn a configuration of Twin-Merging into one of `mediator`, and leave any other as it is.

    Twin-Merging (Lu et al., 2024, arXiv 2406.15479) has a shared model and, for each expert, the leading singular
    triples of its difference from it, which a router weighs for each input. Here the shared model is the dense
    expert, the weighted mean in all layers, and the routers are those of `mediator`.

    Args:
        config: of any merge method.

    Raises:
        ConfigError: a parameter is not one of Twin-Merging.
    """
    if config.merge_method != METHOD:
        return config
    for where, parameters in shared_parameters(config):
        for name in parameters:
            check_known(name, where, {"rank", "weight"})
    for model, parameters in sources(config):
        for name in parameters:
            check_known(name, f"model {model}", {"expert", "weight"})
    settings = {"rank": _DEFAULT_RANK, "route": "all", **(config.parameters or {})}
    return config.model_copy(update={"merge_method": MEDIATOR, "parameters": settings})
