"""The experts of a merge configuration and their names."""

import re
from collections.abc import Collection

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_mediator.errors import ConfigError
from mergekit_mediator.settings import PER_WEIGHT, check_per_weight, scalar, sources

# Belong to one expert, and are given with its model.
PER_EXPERT = frozenset({"expert", "prompts"})
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def named_experts(config: MergeConfiguration, known: Collection[str]) -> dict[ModelReference, str]:
    """Name by model, in the order of the configuration.

    Args:
        config: of the merge.
        known: the names of all parameters.

    Raises:
        ConfigError: a model's parameter that is unknown, misplaced or out of range, fewer than two
            experts, or two of one name.
    """
    experts: dict[ModelReference, str] = {}
    explicit: dict[ModelReference, str] = {}
    for model, parameters in sources(config):
        where = f"model {model}"
        for name, setting in parameters.items():
            check_known(name, where, known)
            if name not in PER_EXPERT and name not in ("weight", "density"):
                raise ConfigError(f"{where}: {name!r} holds for all experts: put it top level")
            if name in PER_WEIGHT:
                check_per_weight(name, setting, where)
            if name == "expert":
                given = str(scalar(setting, f"{where}: expert"))
                if explicit.setdefault(model, given) != given:
                    raise ConfigError(f"{where}: named both {explicit[model]!r} and {given!r}")
        if model == config.base_model:
            if parameters:
                raise ConfigError(f"{where}: the base model takes no parameters of its own")
            continue
        experts[model] = ""
    for model in experts:
        experts[model] = _expert_name(model, explicit.get(model))
    if len(experts) < 2:
        raise ConfigError(f"models: at least two experts required, got {len(experts)}")
    by_name: dict[str, ModelReference] = {}
    for model, name in experts.items():
        if name.lower() in by_name:
            raise ConfigError(
                f"models: {by_name[name.lower()]} and {model} are both named {name!r}: "
                "give each its own `expert:` name"
            )
        by_name[name.lower()] = model
    return experts


def prompt_files(config: MergeConfiguration) -> dict[ModelReference, str]:
    """The file of prompts that each expert is tuned on, by model; only of those that have one.

    Raises:
        ConfigError: a model has two, or no plain name of a file.
    """
    files: dict[ModelReference, str] = {}
    for model, parameters in sources(config):
        if "prompts" in parameters:
            given = str(scalar(parameters["prompts"], f"model {model}: prompts"))
            if files.setdefault(model, given) != given:
                raise ConfigError(f"model {model}: prompts: both {files[model]!r} and {given!r}")
    return files


def _expert_name(model: ModelReference, explicit: str | None) -> str:
    if explicit is not None:
        if not _NAME.fullmatch(explicit):
            raise ConfigError(
                f"model {model}: expert name {explicit!r} must be 1 to 64 characters of "
                "a-z 0-9 . _ - and start with a letter or digit"
            )
        return explicit
    path = (model.lora or model.model).path.rstrip("/").rsplit("/", 1)[-1]
    name = re.sub(r"[^a-z0-9._-]+", "-", path.lower()).lstrip("._-")[:64]
    if not name:
        raise ConfigError(
            f"model {model}: no expert name follows from its path: add `expert: NAME`"
        )
    return name


def check_known(name: str, where: str, known: Collection[str]) -> None:
    """
    Raises:
        ConfigError: there is no parameter of that name.
    """
    if name not in known:
        raise ConfigError(
            f"{where}: unknown parameter {name!r}; known are {', '.join(sorted(known))}"
        )
