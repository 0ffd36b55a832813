"""`MediatorConfig`: the parameters of this method, typed and checked before any weight is read."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mergekit_mediator.delta.value_forms import VALUES, RateForm, StoredValues
from mergekit_mediator.errors import ConfigError
from mergekit_mediator.merge.conflict import Metric
from mergekit_mediator.merge.layers import Selection
from mergekit_mediator.merge.merged_reference import check_reference
from mergekit_mediator.merge.parameters import (
    PER_EXPERT,
    PER_WEIGHT,
    check_known,
    check_per_weight,
    named_experts,
    prompts_of_experts,
    scalar,
    shared_parameters,
    sources,
)

# The part of its gain that every expert keeps if nothing says how experts are stored or which layers are routed.
DEFAULT_KEEP = 0.99
_RULES = ("conflict_threshold", "routed_fraction", "routed_layers", "budget", "keep")
_STORAGE = frozenset({"density", "values", "bits", "budget", "rank", "keep"})
# These parameters have a meaning only where layers are averaged.
_OF_AVERAGED = frozenset({"conflict", "denoise", "lambda"})
_DTYPES = ("float32", "bfloat16", "float16", "float64")
# All but the first two are merge methods.
Reference = Literal["mean", "base", "regmean_pp", "tsvm", "wudi"]
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*(x|[kmgt]?b)")


class MediatorConfig(BaseModel):
    """The parameters of a whole merge. mergekit resolves those of `PER_WEIGHT`.

    Attributes:
        conflict: the metric by which the selection ranks layers.
        denoise: the fraction in (0, 1] of each task vector, largest first, that counts as a change for
            `sign`.
        route: the layers to route, unless one of the next three parameters chooses them. `auto` becomes
            `all` for adapters that keep their own factors: these are small whatever their conflict.
        conflict_threshold: route the layers whose conflict, in [0, 1], is above it.
        routed_fraction: route this fraction in [0, 1] of the layers, those nearest the middle block, or those
            of most conflict if the configuration has `conflict`.
        routed_layers: route these layers, such as `embed,0-3,30`.
        values: the form in which sparse experts store their values. `random_sign` routes all layers unless one of
            the parameters above chooses them. `low_rank` is low rank plus sparse, which is what `bits` and a `budget`
            store unless told otherwise; `keep` alone chooses for each expert.
        bits: bits per parameter of the routed weights for each expert, instead of `density` and `values`.
            Experts are then low rank plus sparse, and weights share the bits so that least squared error
            remains.
        keep: the part in (0, 1) of its gain over the dense expert that every expert keeps, by prediction. It
            routes all layers, and every expert takes the fewest bytes, in the form of `rate_forms` that needs fewest.
            A `budget` caps them.
        budget: the size of the whole directory, as a multiple of the dense expert's checkpoint with its
            tokenizer (`1.25x`) or in bytes (`24GB`). It routes all layers, and all weights of all experts
            share the bits.
        rank: the number of leading singular triples that experts store of each matrix's difference from the
            dense expert, instead of `density` and `values`; other weights are stored exactly.
        basis: `own` or `shared`: whether the triples of `rank` are each expert's own, or one basis that all experts
            share, with coefficients for each; see `methods.shared_basis`.
        storage_given: whether the configuration has `density`, `values`, `bits`, `budget`, `rank` or `keep`.
        reference: the dense expert's weights in routed layers: the weighted mean, or the base. The name of a merge
            method makes it the merge of the experts by this method, in all layers; see `merge.merged_reference`.
        base_model: the model of which all experts are fine-tunes.
        experts: the name of each expert by its model, in the order of the configuration.
        prompts: by model, a file of prompts on which the stored form of this expert is tuned, see
            `merge.experts.tuning`, or the number of texts that the expert writes for it. It requires `keep`, `bits`
            or a `budget`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    conflict: Metric = "mass"
    denoise: Annotated[float, Field(gt=0, le=1)] = 0.2
    route: Literal["auto", "all", "none"] = "auto"
    conflict_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    routed_fraction: Annotated[float, Field(ge=0, le=1)] | None = None
    routed_layers: str | None = None
    values: StoredValues = "exact"
    bits: Annotated[float, Field(gt=0, le=64)] | None = None
    budget: str | None = None
    keep: float | None = None
    rank: Annotated[int, Field(ge=1)] | None = None
    basis: Literal["own", "shared"] | None = None
    storage_given: bool = False
    reference: Reference = "mean"
    base_model: ModelReference
    experts: dict[ModelReference, str]
    prompts: dict[ModelReference, str | int] = {}

    @model_validator(mode="before")
    @classmethod
    def _plain_layers(cls, fields: Any) -> Any:
        """Turn numbers into text: YAML reads `routed_layers: 3` and `budget: 2` as numbers."""
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

    @field_validator("keep")
    @classmethod
    def _part(cls, keep: float | None) -> float | None:
        if keep is not None and not 0 < keep < 1:
            raise ValueError("a number above 0 and below 1 required, such as 0.99")
        return keep

    @property
    def reference_is_merged(self) -> bool:
        """Whether the dense expert is a merge of the experts by another method."""
        return self.reference not in ("mean", "base")

    @property
    def stores_signs(self) -> bool:
        """Whether experts are stored as signs at random coordinates, whose error is noise."""
        return self.values == "random_sign"

    @property
    def rate_forms(self) -> tuple[RateForm, ...]:
        """The forms of which an expert that is stored by a rate takes one; see `experts.forms`."""
        if self.stores_signs:
            return ("random_sign",)
        if self.keep is not None and self.values != "low_rank":
            return ("low_rank", "random_sign")
        return ("low_rank",)

    @property
    def needs_costs(self) -> bool:
        """Whether the stored form of an expert depends on the costs of its weights."""
        return any(rate is not None for rate in (self.bits, self.budget, self.keep))

    @property
    def density_decides(self) -> bool:
        """Whether `density` says how much experts keep, not a rate, a `rank` or their own factors."""
        return self.rank is None and not (self.needs_costs or self.keeps_factors)

    @property
    def keeps_factors(self) -> bool:
        """Whether experts may keep their own factors.

        They may if all are adapters of the base, if the base is no adapter itself, if no parameter says how to
        store experts, and if they are not stored relative to another merge.
        """
        if self.storage_given or self.base_model.lora is not None or self.reference_is_merged:
            return False
        return all(
            model.lora is not None and model.model == self.base_model.model
            for model in self.experts
        )

    def budget_bytes(self, checkpoint_bytes: int) -> int:
        """Give the budget in bytes.

        Args:
            checkpoint_bytes: the bytes of the dense expert's checkpoint, the `1x` of a budget.
        """
        match = _BUDGET.fullmatch((self.budget or "1x").strip().lower())
        if match is None:
            raise ConfigError(
                f"budget: a multiple such as 1.25x or a size such as 24GB required, got {self.budget!r}"
            )
        number, unit = float(match[1]), match[2]
        return round(number * (checkpoint_bytes if unit == "x" else _UNITS[unit]))

    @property
    def selection(self) -> Selection:
        """The rule that chooses the routed layers."""
        if self.budget is not None or self.keep is not None:
            return Selection("all")
        if self.conflict_threshold is not None:
            return Selection("conflict_threshold", threshold=self.conflict_threshold)
        if self.routed_fraction is not None:
            by_conflict = "conflict" in self.model_fields_set
            return Selection(
                "routed_fraction", fraction=self.routed_fraction, by_conflict=by_conflict
            )
        if self.routed_layers is not None:
            return Selection("routed_layers", layers=self.routed_layers)
        return Selection(self.route)

    @classmethod
    def from_merge_config(cls, config: MergeConfiguration) -> "MediatorConfig":
        """Read and check the parameters of a mergekit configuration.

        Raises:
            ConfigError: a parameter is unknown, misplaced or out of range, two parameters contradict each
                other, there is no base model, there is no expert, or two share a name.
        """
        parsed = cls._parse(config)
        if len(parsed.experts) == 1:
            parsed = parsed._of_one_expert()
        if parsed.route == "auto" and parsed.keeps_factors:
            return parsed.model_copy(update={"route": "all"})
        if parsed.reference_is_merged:
            check_reference(config, parsed.reference)
        if parsed.reference_is_merged or parsed.stores_signs:
            return parsed._of_all_layers()
        return parsed

    @classmethod
    def of_added_expert(cls, config: MergeConfiguration) -> "MediatorConfig":
        """Read and check the parameters of one expert that is added to an artifact. It has no share in the dense expert.

        Raises:
            ConfigError: see `from_merge_config`.
        """
        parsed = cls._parse(config)
        return (
            parsed
            if parsed.reference_is_merged
            else parsed.model_copy(update={"reference": "base"})
        )

    @classmethod
    def _parse(cls, config: MergeConfiguration) -> "MediatorConfig":
        """Read and check the parameters as the configuration has them."""
        if config.base_model is None:
            raise ConfigError("base_model: required by merge_method: mediator, but missing: add it")
        for key, dtype in (("dtype", config.dtype), ("out_dtype", config.out_dtype)):
            if dtype is not None and dtype.removeprefix("torch.") not in _DTYPES:
                raise ConfigError(f"{key}: one of {', '.join(_DTYPES)} required, got {dtype!r}")
        hidden = {"base_model", "experts", "prompts", "storage_given"}
        names = (set(cls.model_fields) - hidden) | PER_WEIGHT | PER_EXPERT
        settings: dict[str, Any] = {}
        given: set[str] = set()
        for where, parameters in shared_parameters(config):
            for name, setting in parameters.items():
                if name == "prompts":  # see `prompts_of_experts`
                    continue
                if name in PER_EXPERT:
                    raise ConfigError(
                        f"{where}: {name!r} belongs to one model's parameters: put it there"
                    )
                check_known(name, where, names)
                given.add(name)
                if name in PER_WEIGHT:
                    check_per_weight(name, setting, where)
                    continue
                if where != "parameters":
                    raise ConfigError(
                        f"{where}: {name!r} holds for the whole merge: put it into the top-level parameters"
                    )
                settings[name] = scalar(setting, f"{where}: {name}")
        capped = {"budget"} if "keep" in settings else set()
        _check_alone([name for name in ("route", *_RULES) if name in settings.keys() - capped])
        storage = _storage_parameters(config)
        if storage & {"bits", "budget", "rank", "keep"}:
            # other names than these are refused below
            takes_none = settings.get("values") in VALUES or "rank" in storage
            _check_alone(sorted(storage - capped - (set() if takes_none else {"values"})))
        settings["storage_given"] = bool(storage)
        try:
            parsed = cls(
                **settings,
                base_model=config.base_model,
                experts=named_experts(config, names),
                prompts=prompts_of_experts(config),
            )
        except ValidationError as error:
            raise ConfigError(_one_line(error)) from error
        layers_given = given & {"route", *_RULES, *_OF_AVERAGED}
        if not (storage or layers_given or parsed.keeps_factors):
            parsed = parsed.model_copy(update={"keep": DEFAULT_KEEP})
        if parsed.prompts and not (parsed.needs_costs or parsed.reference_is_merged):
            raise ConfigError(
                "prompts: they tune experts that are stored by `keep`, `bits` or a `budget`: give one of these"
            )
        if parsed.values == "low_rank" and not parsed.needs_costs:
            raise ConfigError(
                "values: low_rank is a form of `keep`, `bits` or a `budget`: give one of these"
            )
        if parsed.basis is not None and parsed.rank is None:
            raise ConfigError(f"basis: {parsed.basis} of a `rank`, got none: give the rank")
        return parsed

    def _of_one_expert(self) -> "MediatorConfig":
        """Complete the configuration of one expert, which is stored relative to the base in all layers.

        Raises:
            ConfigError: nothing says how few bytes the expert takes, or the mean of the experts is asked for.
        """
        if not (self.needs_costs or self.keeps_factors or self.stores_signs):
            raise ConfigError(
                "models: one expert is stored by `keep`, `bits`, a `budget` or `values: random_sign`, got none: give "
                "one of these, or add models"
            )
        if self.reference != "base" and "reference" in self.model_fields_set:
            raise ConfigError(
                f"reference: the {self.reference} of one expert is this expert, and nothing would be left to store: "
                "remove it"
            )
        return self.model_copy(update={"reference": "base"})._of_all_layers()

    def _of_all_layers(self) -> "MediatorConfig":
        """Route all layers, unless a parameter chooses them: nothing is averaged of which experts would be a part."""
        chosen = {"route", *_RULES} & self.model_fields_set
        return self if chosen else self.model_copy(update={"route": "all"})


def _check_alone(names: Sequence[str]) -> None:
    if len(names) > 1:
        raise ConfigError(
            f"parameters: {' and '.join(names)} contradict each other: give one of them"
        )


def _storage_parameters(config: MergeConfiguration) -> set[str]:
    """Find those parameters of the configuration that say how experts are stored."""
    groups = [*shared_parameters(config), *sources(config)]
    return {name for _, parameters in groups for name in parameters} & _STORAGE


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"parameters: {place}: {message}, got {first['input']!r}"
