"""The places of parameters in a merge configuration, and the values that parameters may have."""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, MergeConfiguration, ParameterSetting

from mergekit_mediator.errors import ConfigError
from mergekit_mediator.store.manifest import EXPERT_NAME

# mergekit resolves these parameters for each weight, so they may be filters and gradients. Each entry
# describes the values that a parameter may have and tests one.
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "weight": ("a finite number of at least 0", lambda value: 0 <= value < math.inf),
    "density": ("a number in (0, 1]", lambda value: 0 < value <= 1),
    "lambda": ("a finite number", math.isfinite),
}
PER_WEIGHT = frozenset(_RANGES)


def sources(
    config: MergeConfiguration,
) -> Iterator[tuple[ModelReference, Mapping[str, ParameterSetting]]]:
    """List every input model with its own parameters, in the order of the configuration.

    Raises:
        ConfigError: the configuration lists a model twice.
    """
    modules = list((config.modules or {}).values())
    for models in [config.models or [], *((m.models or []) for m in modules)]:
        earlier: set[ModelReference] = set()
        for entry in models:
            if entry.model in earlier:
                raise ConfigError(f"models: {entry.model} is listed twice: list it once")
            earlier.add(entry.model)
            yield entry.model, entry.parameters or {}
    for slices in [config.slices or [], *((m.slices or []) for m in modules)]:
        for output in slices:
            for source in output.sources:
                yield source.model, source.parameters or {}


def shared_parameters(
    config: MergeConfiguration,
) -> Iterator[tuple[str, Mapping[str, ParameterSetting]]]:
    """List the groups of parameters that belong to no single model, each with its place."""
    yield "parameters", config.parameters or {}
    for index, output in enumerate(config.slices or []):
        yield f"slices[{index}].parameters", output.parameters or {}
    for name, module in (config.modules or {}).items():
        yield f"modules.{name}.parameters", module.parameters or {}
        for index, output in enumerate(module.slices or []):
            yield f"modules.{name}.slices[{index}].parameters", output.parameters or {}


def scalar(setting: ParameterSetting, where: str) -> Any:
    """Give the value of a setting that has one value for the whole merge.

    Args:
        setting: the setting.
        where: its place and name, for the error message.

    Raises:
        ConfigError: the setting is a gradient, a filter or a boolean.
    """
    if not isinstance(setting, str | int | float):
        raise ConfigError(
            f"{where}: one value required, neither a gradient nor a filter: got {setting!r}"
        )
    if isinstance(setting, bool):
        raise ConfigError(
            f"{where}: a number or a name required, got {setting}: put a name such as 'yes' in quotes"
        )
    return setting


def check_per_weight(name: str, setting: ParameterSetting, where: str) -> None:
    """Check every number of a setting. mergekit interpolates between them, so its numbers are in range too.

    Args:
        name: the name of a parameter of `PER_WEIGHT`.
        setting: its setting: a number, a gradient or a filter.
        where: its place, for the error message.

    Raises:
        ConfigError: a number is out of range, or a list is empty.
    """
    if isinstance(setting, ConditionalParameter):
        check_per_weight(name, setting.value, where)
    elif isinstance(setting, list):
        if not setting:
            raise ConfigError(f"{where}: {name} is an empty list: put a number into it")
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


# These parameters belong to one expert and stand with its model.
PER_EXPERT = frozenset({"expert", "prompts"})


def named_experts(config: MergeConfiguration, names: Collection[str]) -> dict[ModelReference, str]:
    """Name the experts by their models, in the order of the configuration.

    Args:
        config: the configuration of the merge.
        names: the names of all parameters.

    Raises:
        ConfigError: a parameter of a model is unknown, misplaced or out of range, there is no expert, or two
            experts share a name.
    """
    experts: dict[ModelReference, str] = {}
    explicit: dict[ModelReference, str] = {}
    for model, parameters in sources(config):
        where = f"model {model}"
        for name, setting in parameters.items():
            check_known(name, where, names)
            if name not in PER_EXPERT and name not in ("weight", "density"):
                raise ConfigError(
                    f"{where}: {name!r} holds for all experts: put it into the top-level parameters"
                )
            if name in PER_WEIGHT:
                check_per_weight(name, setting, where)
            if name == "expert":
                expert = str(scalar(setting, f"{where}: expert"))
                if explicit.setdefault(model, expert) != expert:
                    raise ConfigError(
                        f"{where}: expert is both {explicit[model]!r} and {expert!r}: choose one name"
                    )
        if model == config.base_model:
            if parameters:
                raise ConfigError(
                    f"{where}: the base model has no parameters of its own: remove them"
                )
            continue
        experts[model] = ""
    for model in experts:
        experts[model] = _expert_name(model, explicit.get(model))
    if not experts:
        raise ConfigError("models: at least one expert required, got 0: add models")
    by_name: dict[str, ModelReference] = {}
    for model, name in experts.items():
        if name.lower() in by_name:
            raise ConfigError(
                f"models: {by_name[name.lower()]} and {model} are both named {name!r}: "
                "give each a name of its own with `expert:`"
            )
        by_name[name.lower()] = model
    return experts


def prompts_of_experts(config: MergeConfiguration) -> dict[ModelReference, str | int]:
    """Find the file of prompts of each expert that is tuned, or the number of texts that it writes, by model.

    A number among the parameters of all models holds for every expert that has neither.

    Raises:
        ConfigError: a model has two of them, `prompts` is neither, or a file stands where it belongs to no model.
    """
    of_all = None
    for where, parameters in shared_parameters(config):
        if "prompts" in parameters:
            of_all = _file_or_number(parameters["prompts"], where)
            if isinstance(of_all, str) or where != "parameters":
                raise ConfigError(
                    f"{where}: 'prompts' belongs to one model's parameters: put it there"
                )
    found: dict[ModelReference, str | int] = {}
    for model, parameters in sources(config):
        if "prompts" in parameters:
            given = _file_or_number(parameters["prompts"], f"model {model}")
            if found.setdefault(model, given) != given:
                raise ConfigError(
                    f"model {model}: prompts is both {found[model]!r} and {given!r}: choose one of them"
                )
    if of_all is not None:
        for model, _ in sources(config):
            if model != config.base_model:
                found.setdefault(model, of_all)
    return found


def _file_or_number(setting: ParameterSetting, where: str) -> str | int:
    given: str | float = scalar(setting, f"{where}: prompts")
    if isinstance(given, float):
        if not given.is_integer():
            raise ConfigError(
                f"{where}: prompts: a file, or the number of texts that the expert writes, required, got {given}"
            )
        return int(given)
    return given


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
            f"model {model}: its path has none of a-z 0-9 for an expert name: add `expert: NAME`"
        )
    return name


def check_known(name: str, where: str, names: Collection[str]) -> None:
    """Refuse a parameter that does not exist.

    Args:
        name: the name of the parameter.
        where: its place, for the error message.
        names: the names of all parameters.

    Raises:
        ConfigError: no parameter has that name.
    """
    if name not in names:
        raise ConfigError(
            f"{where}: unknown parameter {name!r}: use one of {', '.join(sorted(names))}"
        )
