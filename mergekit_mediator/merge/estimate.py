"""What a merge will read, write and need in memory, from headers and the configuration alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mergekit.common import dtype_from_name

from mergekit_mediator.delta.kth_largest import count_kept
from mergekit_mediator.merge.inputs import Inputs
from mergekit_mediator.merge.layers import LayerPlan
from mergekit_mediator.merge.loaders import MAPPED_BYTES
from mergekit_mediator.merge.planner import PlannedWeight
from mergekit_mediator.merge.workers import count_workers
from mergekit_mediator.tune.fit import TOKENS_AT_ONCE

# Python with torch, transformers and mergekit loaded, measured.
_PROCESS_BYTES = 700_000_000
# Bytes for each parameter of a weight: of the sums and the task vector while it is measured; while it is
# encoded, for each that is kept, or for all within `bits` or a `budget`. Measured on a large embedding.
_MEASURING_BYTES = 9
_KEPT_BYTES = 30
_APPROXIMATING_BYTES = 20
# While experts are tuned on prompts: the whole model in float32, the gradient of its largest weight, which is
# copied once, and for each token numbers of every layer and of the vocabulary. Measured on a Llama.
_TUNED_BYTES, _GRADIENT_BYTES = 4, 8
_ACTIVATIONS, _LOGITS = 25, 2
# Each code of factors with its rounded one, its gradient and what Adam keeps of it. A code takes two bits.
_CODE_BYTES, _BITS_OF_A_CODE, _MOST_CODES = 20, 2, 0.25  # the last for each parameter
_CODE_BITS = {"int8": 8, "int4": 4, "sign": 1}


@dataclass(frozen=True)
class LayerEstimate:
    """One layer of a merge, in bytes.

    Attributes:
        plan: its weights, its conflict if measured, and the decision if made.
        parameters: the number of its parameters.
        read: of all models together, and of the experts once more if they may be stored.
        dense: of the dense expert's checkpoint.
        experts: of all sparse experts together, about; 0 if averaged or undecided.
    """

    plan: LayerPlan
    parameters: int
    read: int
    dense: int
    experts: int


@dataclass(frozen=True)
class Estimate:
    """A whole merge, in bytes.

    Attributes:
        layers: in order.
        passes: 2 where experts' weights may be read once more, to store them.
        peak_memory: predicted. It does not depend on the number of layers and experts, but where experts are
            tuned on prompts: that takes the whole model in float32.
    """

    layers: tuple[LayerEstimate, ...]
    passes: int
    peak_memory: int

    @property
    def read(self) -> int:
        """Bytes read in both passes, if layers that are undecided are routed."""
        return sum(layer.read for layer in self.layers)

    @property
    def dense(self) -> int:
        """Bytes of the dense expert."""
        return sum(layer.dense for layer in self.layers)

    @property
    def experts(self) -> int:
        """Bytes of all sparse experts, about."""
        return sum(layer.experts for layer in self.layers)


def estimate(
    inputs: Inputs, weights: Sequence[PlannedWeight], plans: Sequence[LayerPlan]
) -> Estimate:
    """Predict a merge.

    Args:
        inputs: with headers read.
        weights: all of them.
        plans: the layers that they make up.
    """
    by_layer: dict[str, list[PlannedWeight]] = {}
    for weight in weights:
        by_layer.setdefault(weight.layer, []).append(weight)
    dense = sum(size.bytes for size in dense_sizes(inputs, weights).values())
    routed = {plan.name for plan in plans if plan.routed}
    rate = _bits_per_parameter(inputs, dense, [w for w in weights if w.layer in routed])
    layers = tuple(_layer(inputs, by_layer[plan.name], plan, rate) for plan in plans)
    stored = any(plan.routed is not False for plan in plans)
    return Estimate(layers, 2 if stored else 1, _peak_memory(inputs, weights, dense, rate or 0.0))


def _peak_memory(inputs: Inputs, weights: Sequence[PlannedWeight], dense: int, rate: float) -> int:
    """Every worker has a weight of its own, and results of as many may wait for their turn."""
    config, workers = inputs.config, count_workers()
    sizes = sorted((_parameters(inputs, weight) for weight in weights), reverse=True)
    largest = max((_dense_bytes(inputs, weight) for weight in weights), default=0)
    measuring = _MEASURING_BYTES * sum(sizes[:workers]) + workers * largest
    density = max((max(w.densities.values()) for w in weights), default=0.0)
    encoding = _APPROXIMATING_BYTES if config.needs_costs else _KEPT_BYTES * density
    storing = round(encoding * sum(sizes[:1])) * workers
    mapped = min(MAPPED_BYTES, sum(inputs.input_bytes(weight) for weight in weights))
    shard = min(inputs.options.out_shard_size, dense)
    peak: int = _PROCESS_BYTES + mapped + shard + max(measuring, storing)
    if config.prompts:
        tuning = _TUNED_BYTES * sum(sizes) + _GRADIENT_BYTES * max(sizes, default=0)
        codes = min(rate / _BITS_OF_A_CODE, _MOST_CODES) * sum(sizes)
        tuning += round(_CODE_BYTES * codes)
        width, layers = max(1, inputs.hidden_size), len({weight.layer for weight in weights})
        numbers = _ACTIVATIONS * width * layers + _LOGITS * max(sizes, default=0) // width
        tuning += _TUNED_BYTES * TOKENS_AT_ONCE * numbers
        peak = max(peak, _PROCESS_BYTES + mapped + tuning)
    return peak


@dataclass(frozen=True)
class Size:
    """Of one weight of the dense expert: parameters, and bytes in the output dtype."""

    numel: int
    bytes: int


def dense_sizes(inputs: Inputs, weights: Sequence[PlannedWeight]) -> dict[str, Size]:
    """The sizes of the dense expert's weights by name, from headers."""
    return {
        weight.info.name: Size(_parameters(inputs, weight), _dense_bytes(inputs, weight))
        for weight in weights
    }


def _bits_per_parameter(
    inputs: Inputs, dense: int, routed: Sequence[PlannedWeight]
) -> float | None:
    """Of every expert, where `bits` or a `budget` says it."""
    config = inputs.config
    if config.budget is None:
        return config.bits
    stored = sum(_parameters(inputs, weight) for weight in routed) * len(inputs.experts)
    return 8 * max(0, config.budget_bytes(dense) - dense) / stored if stored else None


def _layer(
    inputs: Inputs, weights: list[PlannedWeight], plan: LayerPlan, rate: float | None
) -> LayerEstimate:
    models = inputs.models if plan.routed is False else (*inputs.models, *inputs.experts)
    return LayerEstimate(
        plan=plan,
        parameters=sum(_parameters(inputs, weight) for weight in weights),
        read=sum(inputs.input_bytes(weight, models) for weight in weights),
        dense=sum(_dense_bytes(inputs, weight) for weight in weights),
        experts=sum(_expert_bytes(inputs, w, rate) for w in weights) if plan.routed else 0,
    )


def _parameters(inputs: Inputs, weight: PlannedWeight) -> int:
    header = inputs.header(weight, inputs.base)
    return header.numel if header else 0


def _dense_bytes(inputs: Inputs, weight: PlannedWeight) -> int:
    header = inputs.header(weight, inputs.base)
    if header is None:
        return 0
    dtype = dtype_from_name(weight.info.force_dtype or inputs.out_dtype)
    if dtype:
        return int(header.numel * dtype.itemsize)
    found = (inputs.header(weight, model) for model in inputs.models)
    return max(other.bytes for other in found if other)  # the widest of the inputs


def _expert_bytes(inputs: Inputs, weight: PlannedWeight, rate: float | None) -> int:
    """Positions at their entropy, and one code for each kept coordinate; or so many bits as are given.

    Adapters that are stored as their own factors take less.
    """
    numel = _parameters(inputs, weight)
    if not numel:
        return 0
    if rate is not None:
        return round(numel * rate * len(inputs.experts) / 8)
    code_bits = _CODE_BITS.get(inputs.config.values, 8 * _dense_bytes(inputs, weight) // numel)
    total = 0.0
    for density in weight.densities.values():
        kept = count_kept(numel, density)
        total += numel * _entropy(kept / numel) + kept * code_bits
    return round(total / 8)


def _entropy(share: float) -> float:
    """Bits per coordinate that say which ones are kept."""
    if share in (0.0, 1.0):
        return 0.0
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share)
