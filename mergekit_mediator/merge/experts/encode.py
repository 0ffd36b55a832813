"""The stored form of an expert's weight: its coordinates, its own factors, or low rank plus sparse."""

from collections.abc import Mapping, Sequence

import torch
from mergekit.common import ModelReference
from torch import Tensor

from mergekit_mediator.delta.approximate import approximate
from mergekit_mediator.delta.factors import Factors
from mergekit_mediator.delta.narrow import check_range, narrowed
from mergekit_mediator.delta.random_sign import encode_random_sign
from mergekit_mediator.delta.random_sign_costs import density_at
from mergekit_mediator.delta.sparse import encode
from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.delta.value_forms import RateForm
from mergekit_mediator.merge.adapters.config import adapter_directory
from mergekit_mediator.merge.adapters.lora import read_adapter
from mergekit_mediator.merge.config import MediatorConfig
from mergekit_mediator.merge.conflict import task_vectors
from mergekit_mediator.merge.experts.shared_bases import SharedBases
from mergekit_mediator.merge.experts.spectra import Spectra
from mergekit_mediator.merge.experts.storing import Load
from mergekit_mediator.merge.loaders import OpenInputs
from mergekit_mediator.merge.planner import PlannedWeight
from mergekit_mediator.methods.singular import leading_triples


class Encoder:
    """An encoder of experts' weights, in the form that the configuration asks for."""

    def __init__(
        self,
        config: MediatorConfig,
        device: str,
        slopes: Mapping[ModelReference, float],
        forms: Mapping[ModelReference, RateForm],
        adapters: Mapping[ModelReference, Mapping[str, Factors]],
        spectra: Spectra,
    ) -> None:
        """Choose the form.

        Args:
            config: the configuration of the merge.
            device: the device that computes.
            slopes: the slope of each expert within `bits`, `budget` or `keep`, see `slopes_for`; empty otherwise.
            forms: the form of each expert that has a slope, see `choose_forms`.
            adapters: the own factors of each expert by weight, see `adapters_for`; empty if experts do not
                store them.
            spectra: the decompositions of the task vectors whose costs were measured.
        """
        self._config, self._device = config, device
        self._slopes, self._forms = slopes, forms
        self._adapters, self._spectra = adapters, spectra
        self._bases: SharedBases | None = None
        if config.basis == "shared" and config.rank is not None:
            self._bases = SharedBases(tuple(config.experts), config.rank, device)

    def encode(
        self, weight: PlannedWeight, model: ModelReference, dense: Tensor, load: Load
    ) -> StoredWeight | None:
        """Encode one expert's version of a routed weight.

        Args:
            weight: the weight.
            model: the expert.
            dense: the dense expert's weight, of the same shape, in the output dtype.
            load: loads this weight of the base or of an expert; `encode` loads no tensor that it does not
                use.

        Returns:
            The stored form; None if the expert has the dense expert's weight.

        Raises:
            InputError: a number of the expert's weight is infinite in the output dtype, or `values` asks for
                quantised numbers and a number is not finite.
        """
        where = f"{weight.info.name} of {model}"
        share = weight.shares[model] / sum(weight.shares.values())
        share = share if self._config.reference == "mean" else 0.0
        if self._adapters:
            factors = self._adapters[model].get(weight.names[model].name)
            if factors is None:
                return None
            if dense.dtype == torch.float16:  # no other dtype has so small a range
                check_range(load(model), dense.dtype, where)
            return StoredWeight.of_factors(tuple(dense.shape), dense.dtype, factors, share)
        if self._slopes:
            expert, slope = load(model), self._slopes[model]
            check_range(expert, dense.dtype, where)
            if self._forms[model] == "random_sign":
                (difference,) = task_vectors(dense, [expert], self._device)
                density = density_at(difference, slope)
                return encode_random_sign(
                    narrowed(expert, dense.dtype, where), dense, density, self._device
                )
            # a task vector has a lower rank than the difference from the mean of all experts
            merged = self._config.reference_is_merged
            reference = dense if merged else load(self._config.base_model)
            (tau,) = task_vectors(reference, [expert], self._device)
            name = self._config.experts[model]
            components = self._spectra.read(name, weight.info.name, self._device)
            stored = approximate(tau, slope, dense.dtype, share, components)
            return stored.to(torch.device("cpu"))
        if self._bases is not None and dense.ndim == 2:

            def in_dtype(other: ModelReference) -> Tensor:
                return narrowed(load(other), dense.dtype, f"{weight.info.name} of {other}")

            return self._bases.store(weight.info.name, model, dense, in_dtype)
        density = weight.densities[model]
        expert = narrowed(load(model), dense.dtype, where)
        if self._config.rank is not None:
            return truncated(expert, dense, self._config.rank, self._device)
        match self._config.values:
            case "random_sign":
                return encode_random_sign(expert, dense, density, self._device)
            case "low_rank":
                return None  # without slopes there is no weight that experts can store
            case values:
                return encode(expert, dense, density, values, self._device)


def truncated(expert: Tensor, dense: Tensor, rank: int, device: str) -> StoredWeight:
    """Keep the leading singular triples of what an expert adds to the dense expert.

    Args:
        expert: a weight of any shape, in the dtype of the dense expert.
        dense: the dense expert's weight, of the same shape.
        rank: at most the smaller side of a matrix; of other weights everything is kept.
        device: where the arithmetic is done, in float32.

    Returns:
        The stored form, whose factors have the dtype of the dense expert.
    """
    if expert.ndim != 2:
        return encode(expert, dense, 1.0, "exact", device)
    change = expert.to(device, torch.float32) - dense.to(device, torch.float32)
    left, values, right = leading_triples(change, rank)
    root = values.sqrt()
    dtype = dense.dtype if dense.dtype != torch.float64 else torch.float32
    left, right = ((side * root).to("cpu", dtype).contiguous() for side in (left, right))
    return StoredWeight.of_factors(
        tuple(dense.shape), dense.dtype, Factors(left, right, torch.ones(rank))
    )


def adapters_for(
    inputs: OpenInputs, weights: Sequence[PlannedWeight]
) -> dict[ModelReference, Mapping[str, Factors]]:
    """Read the own factors of every expert, if experts keep them and all are plain adapters of the base.

    Experts keep their factors unless the configuration has `density`, `values`, `bits` or `budget`.

    Args:
        inputs: the models.
        weights: all weights of the merge.

    Returns:
        The factors of each expert, by the name of the weight in the expert: slices may give it another name
        in the merge. Empty if experts do not keep their factors, if an adapter is not plain, or if it changes a
        weight whose rows mergekit aligns.

    Raises:
        InputError: the files of an adapter cannot be read.
    """
    if not inputs.config.keeps_factors:
        return {}
    base_weights = {weight.names[inputs.base].name: weight for weight in weights}

    def base(name: str) -> Tensor | None:
        return inputs.load(base_weights[name], inputs.base) if name in base_weights else None

    adapters: dict[ModelReference, Mapping[str, Factors]] = {}
    for model in inputs.experts:
        factors = read_adapter(adapter_directory(model), base)
        names = {w.names[model].name for w in weights if not w.is_aligned}
        if factors is None or not names.issuperset(factors):
            return {}
        adapters[model] = factors
    return adapters
