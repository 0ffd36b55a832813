"""Where the parameters of a merge configuration stand, and what each that mergekit resolves may be."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, MergeConfiguration, ParameterSetting

from mergekit_mediator.errors import ConfigError

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
