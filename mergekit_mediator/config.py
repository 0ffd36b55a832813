"""MediatorConfig: what a merge configuration asks of this method, typed and checked before any weight is read."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, MergeConfiguration, ParameterSetting
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mergekit_mediator.conflict import Metric
from mergekit_mediator.errors import ConfigError
from mergekit_mediator.plan import Selection
from mergekit_mediator.sparse import Values

# Resolved by mergekit for each weight, so filters and gradients have a meaning; and what each may be.
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "weight": ("a finite number of at least 0", lambda value: 0 <= value < math.inf),
    "density": ("a number in (0, 1]", lambda value: 0 < value <= 1),
    "lambda": ("a finite number", math.isfinite),
}
PER_WEIGHT = frozenset(_RANGES)
# Belong to one expert, and are given with its model.
PER_EXPERT = frozenset({"expert"})
METHOD = "mediator"
_RULES = ("conflict_threshold", "routed_fraction", "routed_layers", "budget")
_STORAGE = frozenset({"density", "values", "bits", "budget"})
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*(x|[kmgt]?b)")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class MediatorConfig(BaseModel):
    """The parameters that hold for a whole merge. Those of `PER_WEIGHT` stay with mergekit.

    Attributes:
        conflict: the metric that the selection of layers looks at.
        denoise: fraction of each task vector, largest first, that counts as a change for `sign`.
        route: which layers are routed, unless one of the next three says it. `auto` becomes `all` for
            adapters that keep their own factors: these are small, and conflict says nothing of them.
        conflict_threshold, routed_fraction, routed_layers: see `plan.Selection`.
        values: how sparse experts store their values.
        bits: per parameter of the routed weights and per expert, instead of `density` and `values`:
            low rank plus sparse, divided among the weights so that least squared error remains.
        budget: of the whole model, as a multiple of the dense expert (`1.25x`) or in bytes (`24GB`);
            routes all layers and divides the bits among all weights of all experts.
        storage_given: whether `density`, `values`, `bits` or `budget` is in the configuration.
        reference: what the dense expert holds in routed layers: the weighted mean, or the base.
        base_model: what all experts are fine-tunes of.
        experts: name by model, in the order of the configuration; at least two.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    conflict: Metric = "mass"
    denoise: Annotated[float, Field(gt=0, le=1)] = 0.2
    route: Literal["auto", "all", "none"] = "auto"
    conflict_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    routed_fraction: Annotated[float, Field(ge=0, le=1)] | None = None
    routed_layers: str | None = None
    values: Values = "exact"
    bits: Annotated[float, Field(gt=0, le=64)] | None = None
    budget: str | None = None
    storage_given: bool = False
    reference: Literal["mean", "base"] = "mean"
    base_model: ModelReference
    experts: dict[ModelReference, str]

    @model_validator(mode="before")
    @classmethod
    def _plain_layers(cls, fields: Any) -> Any:
        """YAML reads `routed_layers: 3` and `budget: 2` as numbers."""
        for name in ("routed_layers", "budget"):
            if isinstance(fields.get(name), int | float):
                fields[name] = str(fields[name])
        return fields

    @field_validator("budget")
    @classmethod
    def _readable_budget(cls, budget: str | None) -> str | None:
        if budget is not None and _BUDGET.fullmatch(budget.strip().lower()) is None:
            raise ValueError("a multiple such as 1.25x or a size such as 24GB required")
        return budget

    @property
    def needs_costs(self) -> bool:
        """Whether what is stored depends on what storing it costs."""
        return self.bits is not None or self.budget is not None

    @property
    def keeps_factors(self) -> bool:
        """Whether all experts are adapters of the base, and nothing says how to store them."""
        return not self.storage_given and all(
            model.lora is not None and model.model == self.base_model.model
            for model in self.experts
        )

    def budget_bytes(self, dense_bytes: int) -> int:
        """The budget in bytes, given the dense expert's."""
        match = _BUDGET.fullmatch((self.budget or "1x").strip().lower())
        if match is None:
            raise ConfigError(f"budget: {self.budget!r} is neither a multiple nor a size")
        number, unit = float(match[1]), match[2]
        return round(number * (dense_bytes if unit == "x" else _UNITS[unit]))

    @property
    def selection(self) -> Selection:
        """The rule that chooses the routed layers."""
        if self.budget is not None:
            return Selection("all")
        if self.conflict_threshold is not None:
            return Selection("conflict_threshold", threshold=self.conflict_threshold)
        if self.routed_fraction is not None:
            return Selection("routed_fraction", fraction=self.routed_fraction)
        if self.routed_layers is not None:
            return Selection("routed_layers", layers=self.routed_layers)
        return Selection(self.route)

    @classmethod
    def from_merge_config(cls, config: MergeConfiguration) -> "MediatorConfig":
        """Read and check the parameters of a mergekit configuration.

        Raises:
            ConfigError: an unknown, misplaced, contradictory or out-of-range parameter, no base
                model, fewer than two experts, or two experts of one name.
        """
        if config.base_model is None:
            raise ConfigError("base_model: required by merge_method: mediator, but not given")
        for key, dtype in (("dtype", config.dtype), ("out_dtype", config.out_dtype)):
            if dtype is not None and dtype.removeprefix("torch.") not in _DTYPES:
                raise ConfigError(f"{key}: one of {', '.join(_DTYPES)} required, got {dtype!r}")
        own: dict[str, Any] = {}
        for where, parameters in _shared_parameters(config):
            for name, setting in parameters.items():
                if name in PER_EXPERT:
                    raise ConfigError(f"{where}: {name!r} belongs to one model's parameters")
                _check_known(name, where)
                if name in PER_WEIGHT:
                    _check_per_weight(name, setting, where)
                    continue
                if where != "parameters":
                    raise ConfigError(
                        f"{where}: {name!r} holds for the whole merge: put it top level"
                    )
                own[name] = _scalar(setting, f"{where}: {name}")
        _check_selection(own)
        given = _given_storage(config)
        if "bits" in given and given & {"density", "values", "budget"}:
            raise ConfigError(f"parameters: {' and '.join(sorted(given))} contradict each other")
        if "budget" in given and given & {"density", "values"}:
            raise ConfigError(f"parameters: {' and '.join(sorted(given))} contradict each other")
        own["storage_given"] = bool(given)
        try:
            parsed = cls(**own, base_model=config.base_model, experts=_experts(config))
        except ValidationError as error:
            raise ConfigError(_one_line(error)) from error
        if parsed.route == "auto" and parsed.keeps_factors:
            return parsed.model_copy(update={"route": "all"})
        return parsed


def _experts(config: MergeConfiguration) -> dict[ModelReference, str]:
    experts: dict[ModelReference, str] = {}
    explicit: dict[ModelReference, str] = {}
    for model, parameters in _sources(config):
        where = f"model {model}"
        for name, setting in parameters.items():
            _check_known(name, where)
            if name not in PER_EXPERT and name not in ("weight", "density"):
                raise ConfigError(f"{where}: {name!r} holds for all experts: put it top level")
            if name in PER_WEIGHT:
                _check_per_weight(name, setting, where)
            if name == "expert":
                given = str(_scalar(setting, f"{where}: expert"))
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


def _sources(
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


def _shared_parameters(
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


def _check_known(name: str, where: str) -> None:
    known = (
        (set(MediatorConfig.model_fields) - {"base_model", "experts", "storage_given"})
        | PER_WEIGHT
        | PER_EXPERT
        | {"budget"}
    )
    if name not in known:
        raise ConfigError(
            f"{where}: unknown parameter {name!r}; known are {', '.join(sorted(known))}"
        )


def _check_selection(own: Mapping[str, Any]) -> None:
    given = [name for name in ("route", *_RULES) if name in own]
    if len(given) > 1:
        raise ConfigError(
            f"parameters: {' and '.join(given)} contradict each other: give one of them"
        )


def _given_storage(config: MergeConfiguration) -> set[str]:
    """Which of the parameters that say how experts are stored are in the configuration."""
    everywhere = [*_shared_parameters(config), *_sources(config)]
    return {name for _, parameters in everywhere for name in parameters} & _STORAGE


def _scalar(setting: ParameterSetting, where: str) -> Any:
    if not isinstance(setting, str | int | float):
        raise ConfigError(f"{where}: takes one value, neither a gradient nor a filter")
    if isinstance(setting, bool):
        raise ConfigError(f"{where}: takes no yes or no, got {setting}: put a name in quotes")
    return setting


def _check_per_weight(name: str, setting: ParameterSetting, where: str) -> None:
    """Check every number that a setting holds: what mergekit interpolates lies between two of them."""
    if isinstance(setting, ConditionalParameter):
        _check_per_weight(name, setting.value, where)
    elif isinstance(setting, list):
        if not setting:
            raise ConfigError(f"{where}: {name} is an empty list: give it a number")
        for entry in setting:
            _check_per_weight(name, entry, where)
    else:
        allowed, fits = _RANGES[name]
        try:
            valid = not isinstance(setting, bool) and fits(float(setting))
        except ValueError:
            valid = False
        if not valid:
            raise ConfigError(f"{where}: {name} must be {allowed}, got {setting!r}")


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"parameters: {place}: {message}, got {first['input']!r}"
