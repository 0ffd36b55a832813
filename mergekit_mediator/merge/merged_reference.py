"""A dense expert that is a merge of the experts by another method, and relative to which they are stored.

The mean of fine-tunes keeps little of each. A better static merge serves tools that know nothing of experts, answers
requests of which the router is not sure, and leaves less to store.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mergekit.config import InputModelDefinition, MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_mediator.errors import ConfigError
from mergekit_mediator.merge.parameters import prompts_of_experts, sources
from mergekit_mediator.methods.with_prompts import WITH_PROMPTS

# The name of its directory inside the staging directory; it is gone before the artifact is described.
REFERENCE = ".reference"
_WITH_PROMPTS = frozenset(kind.spec.name for kind in WITH_PROMPTS)


def check_reference(config: MergeConfiguration, method: str) -> None:
    """Refuse a configuration of which no merge by the method of `reference` can be made, before any weight is read.

    Args:
        config: with `merge_method: mediator`.
        method: the method of `reference`.

    Raises:
        ConfigError: the configuration has slices, weights of experts, or an expert without the prompts that the method
            needs.
    """
    if config.models is None:
        raise ConfigError(
            f"reference: {method} merges whole models: leave out `slices` and `modules`, or take mean or base"
        )
    of_models = ((f"model {model}", parameters) for model, parameters in sources(config))
    for where, parameters in (("parameters", config.parameters or {}), *of_models):
        for name in ("weight", "lambda"):
            if name in parameters:
                raise ConfigError(
                    f"{where}: {name} belongs to the mean of the experts, and the dense expert is their merge by "
                    f"{method}: remove it, or `reference`"
                )
    if method in _WITH_PROMPTS:
        prompted = prompts_of_experts(config)
        for model, _ in sources(config):
            if model != config.base_model and model not in prompted:
                raise ConfigError(
                    f"model {model}: prompts: required by reference: {method}, got none: add `prompts: FILE.jsonl` "
                    "to its parameters"
                )


@contextmanager
def merged_reference(
    config: MergeConfiguration,
    method: str,
    options: MergeOptions,
    out: Path,
    reader: Callable[[Path], Callable[[str], Tensor]],
) -> Iterator[Callable[[str], Tensor]]:
    """Merge the experts by the method of `reference`; the merge lies on disk inside the context.

    Args:
        config: with `merge_method: mediator`.
        method: the method of `reference`.
        options: mergekit's options.
        out: the staging directory of the artifact.
        reader: opens a checkpoint, and gives a function that reads its weights by name.

    Yields:
        A thread-safe function that reads a weight of the merge by name.

    Raises:
        MediatorError: the method refuses the merge.
    """
    import mergekit.merge  # not before the plugin is complete

    directory = out / REFERENCE
    held = dict(LoaderCache().loaders)
    try:
        mergekit.merge.run_merge(
            _by(config, method),
            str(directory),
            options.model_copy(update={"write_model_card": False, "copy_tokenizer": False}),
        )
        LoaderCache().loaders.update(held)  # that merge closed those of adapters
        yield reader(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _by(config: MergeConfiguration, method: str) -> MergeConfiguration:
    """The same merge by another method, at its defaults."""
    prompts = prompts_of_experts(config) if method in _WITH_PROMPTS else {}
    models = [
        InputModelDefinition(
            model=model, parameters={"prompts": prompts[model]} if model in prompts else None
        )
        for model, _ in sources(config)
        if model != config.base_model
    ]
    changed = {"merge_method": method, "models": models, "parameters": None}
    return config.model_copy(update=changed)
