"""Where the parameters of a merge configuration stand, and what each that mergekit resolves may be."""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, MergeConfiguration, ParameterSetting

from mergekit_mediator.errors import ConfigError
from mergekit_mediator.store.manifest import EXPERT_NAME

# Resolved by mergekit for each weight, so filters and gradients have a meaning; and what each may be.
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "weight": ("a finite number of at least 0", lambda value: 0 <= value < math.inf),
    "density": ("a number in (0, 1]", lambda value: 0 < value <= 1),
    "lambda": ("a finite number", math.isfinite),
}
PER_WEIGHT = frozenset(_RANGES)


def sources(
    config: MergeConfiguration,
) -> Iterator[tuple[ModelReference, Mapping[str, ParameterSetting]]]:
    """Every input model with its own parameters, in the order of the configuration."""
    modules = list((config.modules or {}).values())
    for models in [config.models or [], *((m.models or []) for m in modules)]:
        seen: set[ModelReference] = set()
        for entry in models:
            if entry.model in seen:
                raise ConfigError(f"models: {entry.model} is listed twice: one model, one expert")
            seen.add(entry.model)
            yield entry.model, entry.parameters or {}
    for slices in [config.slices or [], *((m.slices or []) for m in modules)]:
        for output in slices:
            for source in output.sources:
                yield source.model, source.parameters or {}


def shared_parameters(
    config: MergeConfiguration,
) -> Iterator[tuple[str, Mapping[str, ParameterSetting]]]:
    """All parameters that do not belong to one model, each with the place where they stand."""
    yield "parameters", config.parameters or {}
    for index, output in enumerate(config.slices or []):
        yield f"slices[{index}].parameters", output.parameters or {}
    for name, module in (config.modules or {}).items():
        yield f"modules.{name}.parameters", module.parameters or {}
        for index, output in enumerate(module.slices or []):
            yield f"modules.{name}.slices[{index}].parameters", output.parameters or {}


def scalar(setting: ParameterSetting, where: str) -> Any:
    """The one value of a setting that holds for the whole merge."""
    if not isinstance(setting, str | int | float):
        raise ConfigError(f"{where}: takes one value, neither a gradient nor a filter")
    if isinstance(setting, bool):
        raise ConfigError(f"{where}: takes no yes or no, got {setting}: put a name in quotes")
    return setting


def check_per_weight(name: str, setting: ParameterSetting, where: str) -> None:
    """Check every number that a setting holds: what mergekit interpolates lies between two of them."""
    if isinstance(setting, ConditionalParameter):
        check_per_weight(name, setting.value, where)
    elif isinstance(setting, list):
        if not setting:
            raise ConfigError(f"{where}: {name} is an empty list: give it a number")
        for entry in setting:
            check_per_weight(name, entry, where)
    else:
        allowed, fits = _RANGES[name]
        try:
            valid = not isinstance(setting, bool) and fits(float(setting))
        except ValueError:
            valid = False
        if not valid:
            raise ConfigError(f"{where}: {name} must be {allowed}, got {setting!r}")


# Belong to one expert, and are given with its model.
PER_EXPERT = frozenset({"expert", "prompts"})


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
        if not re.fullmatch(EXPERT_NAME, explicit):
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
