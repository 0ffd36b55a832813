"""How every expert's version of a weight is stored: its coordinates, its factors, or within a budget."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from mergekit.common import ModelReference
from torch import Tensor

from mergekit_mediator import budget, sparse
from mergekit_mediator.approximate import approximate
from mergekit_mediator.config import MediatorConfig
from mergekit_mediator.conflict import task_vectors
from mergekit_mediator.errors import ConfigError
from mergekit_mediator.expert_file import header_bytes
from mergekit_mediator.factors import Factors
from mergekit_mediator.lora import read_adapter
from mergekit_mediator.passes import Load, Measured
from mergekit_mediator.planner import PlannedWeight
from mergekit_mediator.sparse import SparseTensor

# Of what a budget leaves for experts, this much is for the error of the prediction.
_RESERVE = 0.04


class Storing:
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
    ) -> SparseTensor | None:
        """What one expert keeps of a routed weight; None where it is the dense expert's.

        Args:
            weight: which one.
            model: which expert.
            dense: the dense expert's weight, in the output dtype.
            load: gives the weight of the base or of an expert; called for what is needed only.
        """
        share = weight.shares[model] / sum(weight.shares.values())
        share = 0.0 if self._config.reference == "base" else share
        if self._adapters:
            factors = self._adapters[model].get(weight.info.name)
            if factors is None:
                return None
            return SparseTensor.of_factors(tuple(dense.shape), dense.dtype, factors, share)
        if self._slopes:
            # a task vector is of lower rank than the difference from the mean of all experts
            (tau,) = task_vectors(load(self._config.base_model), [load(model)])
            return approximate(tau, self._slopes[model], dense.dtype, share)
        density, values = weight.densities[model], self._config.values
        return sparse.encode(load(model).to(dense.dtype), dense, density, values, self._device)


def slopes_for(
    config: MediatorConfig,
    weights: Sequence[PlannedWeight],
    measured: Mapping[str, Measured],
    sizes: Mapping[str, int],
    dense_bytes: int,
) -> dict[ModelReference, float]:
    """The slope of each expert: its own for `bits`, one for all experts together for a `budget`.

    One slope for all weights and experts means that no byte would save more squared error elsewhere.

    Args:
        config: of the merge.
        weights: the routed ones.
        measured: by name, with costs.
        sizes: the number of parameters by name.
        dense_bytes: of the dense expert.

    Raises:
        ConfigError: the budget leaves too little, or the bits are fewer than the least possible.
    """
    names = [w.info.name for w in weights if measured[w.info.name].costs]
    numel = sum(sizes[name] for name in names)
    models = list(config.experts)
    if not numel or (config.bits is None and config.budget is None):
        return {}
    costs = [
        torch.stack([measured[name].costs[i][0] for name in names]).sum(dim=0)
        for i in range(len(models))
    ]
    if config.bits is not None:
        return {
            model: budget.slope_for(cost, numel, config.bits)
            for model, cost in zip(models, costs, strict=True)
        }
    headers = len(models) * header_bytes([w.info.name for w in weights])
    left = config.budget_bytes(dense_bytes) - dense_bytes - headers
    if left <= 0:
        raise ConfigError(
            f"budget: {config.budget} is {config.budget_bytes(dense_bytes):,} bytes, and the dense "
            f"expert with the headers of {len(models)} experts takes {dense_bytes + headers:,} alone"
        )
    everything = torch.stack(costs).sum(dim=0)
    bits = 8 * left * (1 - _RESERVE) / (numel * len(models))
    slope = budget.slope_for(everything, numel * len(models), bits)
    return dict.fromkeys(models, slope)


def adapters_for(
    config: MediatorConfig, weights: Sequence[PlannedWeight]
) -> dict[ModelReference, Mapping[str, Factors]]:
    """Every expert's own factors, if all experts are plain adapters of the base; else none.

    Only where nothing else is asked for: `density`, `values`, `bits` and `budget` all are given up by it.
    """
    if config.storage_given or any(model.lora is None for model in config.experts):
        return {}
    if any(model.model != config.base_model.model for model in config.experts):
        return {}
    known = {weight.info.name for weight in weights}
    adapters: dict[ModelReference, Mapping[str, Factors]] = {}
    for model in config.experts:
        factors = read_adapter(_directory(model))
        if factors is None or not known.issuperset(factors):
            return {}
        adapters[model] = factors
    return adapters


def _directory(model: ModelReference) -> Path:
    path = Path(model.lora.path)
    if path.is_dir():
        return path
    return Path(snapshot_download(model.lora.path, revision=model.lora.revision))
