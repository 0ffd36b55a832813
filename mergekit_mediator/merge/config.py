"""MediatorConfig: what a merge configuration asks of this method, typed and checked before any weight is read."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mergekit_mediator.delta.value_forms import Values
from mergekit_mediator.errors import ConfigError
from mergekit_mediator.merge.conflict import Metric
from mergekit_mediator.merge.layers import Selection
from mergekit_mediator.merge.parameters import (
    PER_EXPERT,
    PER_WEIGHT,
    check_known,
    check_per_weight,
    named_experts,
    prompt_files,
    scalar,
    shared_parameters,
    sources,
)

_RULES = ("conflict_threshold", "routed_fraction", "routed_layers", "budget")
_STORAGE = frozenset({"density", "values", "bits", "budget"})
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*(x|[kmgt]?b)")


class MediatorConfig(BaseModel):
    """The parameters that hold for a whole merge. Those of `PER_WEIGHT` stay with mergekit.

    Attributes:
        conflict: the metric that the selection of layers looks at.
        denoise: fraction of each task vector, largest first, that counts as a change for `sign`.
        route: which layers are routed, unless one of the next three says it. `auto` becomes `all` for
            adapters that keep their own factors: these are small, and conflict says nothing of them.
        conflict_threshold, routed_fraction, routed_layers: see `plan.Selection`. A fraction is of the layers
            nearest the middle, or of most conflict if `conflict` is given.
        values: how sparse experts store their values.
        bits: per parameter of the routed weights and per expert, instead of `density` and `values`:
            low rank plus sparse, divided among the weights so that least squared error remains.
        budget: of the whole directory, as a multiple of the dense expert's checkpoint with its tokenizer
            (`1.25x`) or in bytes (`24GB`); routes all layers and divides the bits among all weights of
            all experts.
        storage_given: whether `density`, `values`, `bits` or `budget` is in the configuration.
        reference: what the dense expert holds in routed layers: the weighted mean, or the base.
        base_model: what all experts are fine-tunes of.
        experts: name by model, in the order of the configuration; at least two.
        prompts: by model, a file of prompts that what is stored of it is tuned on; see `distil`. Takes
            `bits` or a `budget`.
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
    prompts: dict[ModelReference, str] = {}

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
    def density_decides(self) -> bool:
        """Whether experts keep a fraction of each weight, and not what a budget or their factors give."""
        return not (self.needs_costs or self.keeps_factors)

    @property
    def keeps_factors(self) -> bool:
        """Whether all experts are adapters of the base, which is none, and nothing says how to store them."""
        if self.storage_given or self.base_model.lora is not None:
            return False
        return all(
            model.lora is not None and model.model == self.base_model.model
            for model in self.experts
        )

    def budget_bytes(self, checkpoint_bytes: int) -> int:
        """The budget in bytes, given those of the dense expert's checkpoint."""
        match = _BUDGET.fullmatch((self.budget or "1x").strip().lower())
        if match is None:
            raise ConfigError(f"budget: {self.budget!r} is neither a multiple nor a size")
        number, unit = float(match[1]), match[2]
        return round(number * (checkpoint_bytes if unit == "x" else _UNITS[unit]))

    @property
    def selection(self) -> Selection:
        """The rule that chooses the routed layers."""
        if self.budget is not None:
            return Selection("all")
        if self.conflict_threshold is not None:
            return Selection("conflict_threshold", threshold=self.conflict_threshold)
        if self.routed_fraction is not None:
            given = "conflict" in self.model_fields_set
            return Selection("routed_fraction", fraction=self.routed_fraction, by_conflict=given)
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
        hidden = {"base_model", "experts", "prompts", "storage_given"}
        known = (set(cls.model_fields) - hidden) | PER_WEIGHT | PER_EXPERT
        own: dict[str, Any] = {}
        for where, parameters in shared_parameters(config):
            for name, setting in parameters.items():
                if name in PER_EXPERT:
                    raise ConfigError(f"{where}: {name!r} belongs to one model's parameters")
                check_known(name, where, known)
                if name in PER_WEIGHT:
                    check_per_weight(name, setting, where)
                    continue
                if where != "parameters":
                    raise ConfigError(
                        f"{where}: {name!r} holds for the whole merge: put it top level"
                    )
                own[name] = scalar(setting, f"{where}: {name}")
        _check_selection(own)
        given = _given_storage(config)
        if "bits" in given and given & {"density", "values", "budget"}:
            raise ConfigError(f"parameters: {' and '.join(sorted(given))} contradict each other")
        if "budget" in given and given & {"density", "values"}:
            raise ConfigError(f"parameters: {' and '.join(sorted(given))} contradict each other")
        own["storage_given"] = bool(given)
        try:
            parsed = cls(
                **own,
                base_model=config.base_model,
                experts=named_experts(config, known),
                prompts=prompt_files(config),
            )
        except ValidationError as error:
            raise ConfigError(_one_line(error)) from error
        if parsed.prompts and not parsed.needs_costs:
            raise ConfigError(
                "prompts: they tune what a `budget` or `bits` store of an expert: give one of these"
            )
        if parsed.route == "auto" and parsed.keeps_factors:
            return parsed.model_copy(update={"route": "all"})
        return parsed


def _check_selection(own: Mapping[str, Any]) -> None:
    given = [name for name in ("route", *_RULES) if name in own]
    if len(given) > 1:
        raise ConfigError(
            f"parameters: {' and '.join(given)} contradict each other: give one of them"
        )


def _given_storage(config: MergeConfiguration) -> set[str]:
    """Which of the parameters that say how experts are stored are in the configuration."""
    everywhere = [*shared_parameters(config), *sources(config)]
    return {name for _, parameters in everywhere for name in parameters} & _STORAGE


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"parameters: {place}: {message}, got {first['input']!r}"
