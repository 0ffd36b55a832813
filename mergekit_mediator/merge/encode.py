"""How every expert's version of a weight is stored: its coordinates, its factors, or within a budget."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from mergekit.common import ModelReference
from torch import Tensor

from mergekit_mediator.delta.approximate import approximate
from mergekit_mediator.delta.factors import Factors
from mergekit_mediator.delta.narrow import check_range, narrowed
from mergekit_mediator.delta.stored_weight import StoredWeight, encode
from mergekit_mediator.merge.config import MediatorConfig
from mergekit_mediator.merge.conflict import task_vectors
from mergekit_mediator.merge.loaders import OpenInputs
from mergekit_mediator.merge.lora import read_adapter
from mergekit_mediator.merge.passes import Load
from mergekit_mediator.merge.planner import PlannedWeight


class Encoder:
    """Encodes experts as a configuration asks."""

    def __init__(
        self,
        config: MediatorConfig,
        device: str,
        slopes: Mapping[ModelReference, float],
        adapters: Mapping[ModelReference, Mapping[str, Factors]],
    ) -> None:
        """
        Args:
            config: of the merge.
            device: where magnitudes are compared.
            slopes: by expert, for `bits` and `budget`; see `slopes_for`.
            adapters: by expert, its own factors by weight, if they are what is stored.
        """
        self._config, self._device = config, device
        self._slopes, self._adapters = slopes, adapters

    def encode(
        self, weight: PlannedWeight, model: ModelReference, dense: Tensor, load: Load
    ) -> StoredWeight | None:
        """What one expert keeps of a routed weight; None where it is the dense expert's.

        Args:
            weight: which one.
            model: which expert.
            dense: the dense expert's weight, in the output dtype.
            load: gives the weight of the base or of an expert; called for what is needed only.

        Raises:
            InputError: the expert's weight is not finite, or would not be in the output dtype.
        """
        where = f"{weight.info.name} of {model}"
        share = weight.shares[model] / sum(weight.shares.values())
        share = 0.0 if self._config.reference == "base" else share
        if self._adapters:
            factors = self._adapters[model].get(weight.names[model].name)
            if factors is None:
                return None
            if dense.dtype == torch.float16:  # of the others, none has so small a range
                check_range(load(model), dense.dtype, where)
            return StoredWeight.of_factors(tuple(dense.shape), dense.dtype, factors, share)
        if self._slopes:
            # a task vector is of lower rank than the difference from the mean of all experts
            own = load(model)
            check_range(own, dense.dtype, where)
            (tau,) = task_vectors(load(self._config.base_model), [own])
            slope = self._slopes[model] / weight.importance
            return approximate(tau, slope, dense.dtype, share)
        density, values = weight.densities[model], self._config.values
        own = narrowed(load(model), dense.dtype, where)
        return encode(own, dense, density, values, self._device)


def adapters_for(
    inputs: OpenInputs, weights: Sequence[PlannedWeight]
) -> dict[ModelReference, Mapping[str, Factors]]:
    """Every expert's own factors, if all experts are plain adapters of the base; else none.

    Only where nothing else is asked for: `density`, `values`, `bits` and `budget` all are given up by it.
    Factors are by the names that weights have in the expert, from which slices may differ.
    """
    if not inputs.config.keeps_factors:
        return {}
    of_base = {weight.names[inputs.base].name: weight for weight in weights}

    def base(name: str) -> Tensor | None:
        return inputs.load(of_base[name], inputs.base) if name in of_base else None

    adapters: dict[ModelReference, Mapping[str, Factors]] = {}
    for model in inputs.experts:
        factors = read_adapter(adapter_directory(model), base)
        own = {w.names[model].name for w in weights if not w.is_aligned}
        if factors is None or not own.issuperset(factors):
            return {}
        adapters[model] = factors
    return adapters


def adapter_directory(model: ModelReference) -> Path:
    """Where the files of a model's adapter are on this machine; downloads them as needed."""
    path = Path(model.lora.path)
    if path.is_dir():
        return path
    return Path(snapshot_download(model.lora.path, revision=model.lora.revision))
