"""A prediction of the bytes that a merge reads, writes and holds in memory, from headers alone."""

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

# The constants of memory were measured once, and no results file holds the measurements. `memory` in
# benchmarks/results/scale.json has the peaks of whole merges.

# Python with torch, transformers and mergekit loaded.
_PROCESS_BYTES = 700_000_000
# Bytes per parameter of a large embedding: its sums and its task vector during the first pass; in the second
# pass those for each coordinate that an expert keeps, or for each parameter within `bits`, `budget` or `keep`, and for
# `random_sign`.
_MEASURING_BYTES = 9
_KEPT_BYTES = 30
_APPROXIMATING_BYTES = 20
# Tuning of a Llama: bytes per parameter of the model in float32, bytes per parameter of its largest weight for
# a gradient and its copy, and float32 numbers per token: of activations for each layer and hidden dimension,
# and of logits for each token of the vocabulary.
_TUNED_BYTES, _GRADIENT_BYTES = 4, 8
_ACTIVATIONS, _LOGITS = 25, 2
# Tuning of factors: bytes per code for its values, its gradient and the state of Adam, the bits of a code in
# the file, and the largest number of codes per parameter.
_CODE_BYTES, _BITS_OF_A_CODE, _MOST_CODES = 20, 2, 0.25
_CODE_BITS = {"int8": 8, "int4": 4, "sign": 1, "random_sign": 1.3}


@dataclass(frozen=True)
class LayerEstimate:
    """The prediction for one layer.

    Attributes:
        plan: the plan of the layer.
        parameters: the number of its parameters.
        read: bytes that the merge reads from all models; twice from experts unless the layer is averaged.
        dense: bytes in the dense expert's checkpoint.
        experts: the approximate bytes in the files of all experts; 0 if the layer is averaged or undecided.
    """

    plan: LayerPlan
    parameters: int
    read: int
    dense: int
    experts: int


@dataclass(frozen=True)
class Estimate:
    """The prediction for a whole merge.

    Attributes:
        layers: the predictions for the layers in order.
        passes: the number of passes over the experts' weights: 1, and another if experts may store a layer, and another if
            the costs of random signs are measured. Experts that `keep` then stores as low rank plus sparse are read once
            more.
        peak_memory: bytes. It does not depend on the number of layers and experts, except that tuning holds
            the whole model in float32.
    """

    layers: tuple[LayerEstimate, ...]
    passes: int
    peak_memory: int

    @property
    def read(self) -> int:
        """Bytes that all passes read, if undecided layers turn out to be routed."""
        return sum(layer.read for layer in self.layers)

    @property
    def dense(self) -> int:
        """Bytes of the dense expert's checkpoint."""
        return sum(layer.dense for layer in self.layers)

    @property
    def experts(self) -> int:
        """The approximate bytes of all experts' files."""
        return sum(layer.experts for layer in self.layers)


def estimate(
    inputs: Inputs, weights: Sequence[PlannedWeight], plans: Sequence[LayerPlan]
) -> Estimate:
    """Predict a merge.

    Args:
        inputs: the models, entered.
        weights: all weights of the merge.
        plans: the plans of all layers.
    """
    by_layer: dict[str, list[PlannedWeight]] = {}
    for weight in weights:
        by_layer.setdefault(weight.layer, []).append(weight)
    dense = sum(size.bytes for size in dense_sizes(inputs, weights).values())
    routed = {plan.name for plan in plans if plan.routed}
    rate = _bits_per_parameter(inputs, dense, [w for w in weights if w.layer in routed])
    layers = tuple(_layer(inputs, by_layer[plan.name], plan, rate) for plan in plans)
    passes = max((_reads(inputs, plan) for plan in plans), default=1)
    return Estimate(layers, passes, _peak_memory(inputs, weights, dense, rate or 0.0))


def _peak_memory(inputs: Inputs, weights: Sequence[PlannedWeight], dense: int, rate: float) -> int:
    """Predict the largest memory in bytes.

    Every worker holds a weight, and the result of one more weight for each worker may wait for its turn.
    """
    config, workers = inputs.config, count_workers()
    sizes = sorted((_parameters(inputs, weight) for weight in weights), reverse=True)
    largest = max((_dense_bytes(inputs, weight) for weight in weights), default=0)
    measuring = _MEASURING_BYTES * sum(sizes[:workers]) + workers * largest
    density = max((max(w.densities.values()) for w in weights), default=0.0)
    whole = config.needs_costs or config.stores_signs
    encoding = _APPROXIMATING_BYTES if whole else _KEPT_BYTES * density
    storing = round(encoding * sum(sizes[:1])) * workers
    if config.reference_is_merged:  # the merge holds one weight of all models in float32
        measuring = max(measuring, _TUNED_BYTES * (len(inputs.models) + 2) * sum(sizes[:1]))
    shard = min(inputs.options.out_shard_size, dense)
    peak: int = smallest_memory(inputs, weights) + shard + max(measuring, storing)
    if config.prompts:
        tuning = _TUNED_BYTES * sum(sizes) + _GRADIENT_BYTES * max(sizes, default=0)
        codes = min(rate / _BITS_OF_A_CODE, _MOST_CODES) * sum(sizes)
        tuning += round(_CODE_BYTES * codes)
        tuning += largest_activations(inputs, weights)
        peak = max(peak, smallest_memory(inputs, weights) + tuning)
    return peak


def smallest_memory(inputs: Inputs, weights: Sequence[PlannedWeight]) -> int:
    """Predict the bytes that any merge takes: the process with its libraries, and mapped files."""
    return _PROCESS_BYTES + min(MAPPED_BYTES, sum(inputs.input_bytes(w) for w in weights))


def largest_activations(inputs: Inputs, weights: Sequence[PlannedWeight]) -> int:
    """Predict the bytes of the activations and logits of a backward pass."""
    width, layers = max(1, inputs.hidden_size), len({weight.layer for weight in weights})
    largest = max((_parameters(inputs, weight) for weight in weights), default=0)
    numbers = _ACTIVATIONS * width * layers + _LOGITS * largest // width
    return _TUNED_BYTES * TOKENS_AT_ONCE * numbers


@dataclass(frozen=True)
class Size:
    """The size of one weight of the dense expert.

    Attributes:
        numel: the number of its parameters.
        bytes: its bytes in the output dtype.
    """

    numel: int
    bytes: int


def dense_sizes(inputs: Inputs, weights: Sequence[PlannedWeight]) -> dict[str, Size]:
    """Compute the sizes of the dense expert's weights by name, from headers."""
    return {
        weight.info.name: Size(_parameters(inputs, weight), _dense_bytes(inputs, weight))
        for weight in weights
    }


def _bits_per_parameter(
    inputs: Inputs, dense: int, routed: Sequence[PlannedWeight]
) -> float | None:
    """Predict the bits per parameter of every expert; None without `bits`, `budget` and `keep`.

    They are 0 with `keep` alone, because only the weights tell what it takes.
    """
    config = inputs.config
    if config.budget is None:
        return 0.0 if config.keep is not None else config.bits
    count = sum(_parameters(inputs, weight) for weight in routed) * len(inputs.experts)
    return 8 * max(0, config.budget_bytes(dense) - dense) / count if count else None


def _layer(
    inputs: Inputs, weights: list[PlannedWeight], plan: LayerPlan, rate: float | None
) -> LayerEstimate:
    models = (*inputs.models, *inputs.experts * (_reads(inputs, plan) - 1))
    return LayerEstimate(
        plan=plan,
        parameters=sum(_parameters(inputs, weight) for weight in weights),
        read=sum(inputs.input_bytes(weight, models) for weight in weights),
        dense=sum(_dense_bytes(inputs, weight) for weight in weights),
        experts=sum(_expert_bytes(inputs, w, rate) for w in weights) if plan.routed else 0,
    )


def _reads(inputs: Inputs, plan: LayerPlan) -> int:
    """How often the experts' versions of a layer are read."""
    if plan.routed is False:
        return 1
    config = inputs.config
    return 2 + (config.needs_costs and "random_sign" in config.rate_forms)


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
    headers = (inputs.header(weight, model) for model in inputs.models)
    return max(other.bytes for other in headers if other)  # the widest dtype of the inputs


def _expert_bytes(inputs: Inputs, weight: PlannedWeight, rate: float | None) -> int:
    """Predict the bytes of one weight in all experts.

    Without a rate, a coordinate that an expert keeps takes one code, and its position takes its entropy.
    Adapters that keep their own factors take less.
    """
    numel = _parameters(inputs, weight)
    if not numel:
        return 0
    if rate is not None:
        return round(numel * rate * len(inputs.experts) / 8)
    rank, header = inputs.config.rank, inputs.header(weight, inputs.base)
    if rank is not None and header is not None:
        numbers = rank * sum(header.shape) if len(header.shape) == 2 else numel
        return round(numbers * _dense_bytes(inputs, weight) / numel) * len(inputs.experts)
    code_bits = _CODE_BITS.get(inputs.config.values, 8 * _dense_bytes(inputs, weight) // numel)
    total = 0.0
    for density in weight.densities.values():
        count = count_kept(numel, density)
        # random coordinates follow from their number
        places = 0.0 if inputs.config.stores_signs else numel * _entropy(count / numel)
        total += places + count * code_bits
    return round(total / 8)


def _entropy(share: float) -> float:
    """Compute the entropy in bits per coordinate of a choice of this share of all coordinates."""
    if share in (0.0, 1.0):
        return 0.0
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share)
