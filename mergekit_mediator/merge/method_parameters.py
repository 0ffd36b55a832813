"""The parameters of a configuration against those that a merge method has, before any weight is read."""

from typing import Any

from mergekit.config import ConditionalParameter, MergeConfiguration, ParameterSetting
from mergekit.merge_methods.base import MergeMethodSpec, ParameterScope, ParameterSpec
from pydantic import ValidationError

from mergekit_mediator.errors import ConfigError
from mergekit_mediator.merge.parameters import check_known, shared_parameters, sources


def check_parameters(config: MergeConfiguration, spec: MergeMethodSpec) -> None:
    """Refuse parameters that mergekit would pass over, or refuse in many lines.

    Args:
        config: of a merge with this method.
        spec: of the method.

    Raises:
        ConfigError: no base model, an unknown or misplaced parameter, or one with a value that it cannot have.
    """
    if config.base_model is None and not any(s.base_model for s in config.slices or ()):
        raise ConfigError(f"base_model: required by merge_method: {spec.name}, but not given")
    known = {parameter.name: parameter for parameter in spec.parameters}
    for where, parameters in shared_parameters(config):
        for name, setting in parameters.items():
            check_known(name, where, known)
            _check_values(known[name], setting, where)
    for model, parameters in sources(config):
        where = f"model {model}"
        for name, setting in parameters.items():
            check_known(name, where, known)
            if known[name].scope == ParameterScope.SHARED:
                raise ConfigError(f"{where}: {name!r} holds for all experts: put it top level")
            _check_values(known[name], setting, where)


def _check_values(parameter: ParameterSpec, setting: ParameterSetting, where: str) -> None:
    """Check every value that a setting holds: what mergekit interpolates lies between two of them."""
    if isinstance(setting, list):
        if not setting:
            raise ConfigError(f"{where}: {parameter.name} is an empty list: give it a value")
        for entry in setting:
            _check_values(parameter, entry, where)
        return
    value: Any = setting.value if isinstance(setting, ConditionalParameter) else setting
    if isinstance(value, list):
        _check_values(parameter, value, where)
        return
    try:
        parameter.validate(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ConfigError(f"{where}: {parameter.name}: {reason}, got {value!r}") from error
