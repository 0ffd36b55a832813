"""The passes over the weights of a merge, which read one expert at a time.

`measure` yields the conflict and the costs of each weight, and `average` also the dense expert's weight; the latter
measures the metric `sign` only if layers are chosen by it. Sums
replace experts in memory, so memory does not grow with the number of experts. `experts.storing` has the pass that
encodes the experts.
"""

import math
from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.merge_methods.buffers import copy_non_floating_buffer
from torch import Tensor

from mergekit_mediator.delta.factors import squared_norm
from mergekit_mediator.delta.narrow import check_range, narrowed, range_error
from mergekit_mediator.delta.value_forms import RateForm
from mergekit_mediator.errors import InputError, first_line
from mergekit_mediator.merge.conflict import Accumulator, Conflict, task_vectors
from mergekit_mediator.merge.experts.costs import CostMeter
from mergekit_mediator.merge.loaders import OpenInputs
from mergekit_mediator.merge.measured import Averaged, DenseVersions, Measured
from mergekit_mediator.merge.planner import PlannedWeight
from mergekit_mediator.merge.progress import bytes_bar
from mergekit_mediator.merge.workers import Workers, load_linear_algebra
from mergekit_mediator.methods.weighted_mean import WeightedSum, on_base
from mergekit_mediator.route.response import is_measured, leading_directions


class Passes:
    """The passes over the weights of a merge. Each worker reads one expert of one weight at a time.

    Attributes:
        inputs: the models.
        device: the device that computes.
    """

    def __init__(
        self,
        inputs: OpenInputs,
        workers: Workers,
        allow_nonfinite: bool = False,
        costs: CostMeter | None = None,
        reference: Callable[[str], Tensor] | None = None,
    ) -> None:
        """Prepare the passes.

        Args:
            inputs: the models, entered.
            workers: the threads of the passes.
            allow_nonfinite: accept NaN and infinity in the inputs.
            costs: measures costs; None to measure them in every form, and to keep no decomposition.
            reference: reads a weight of the dense expert by name, if it is there already; then costs are those of
                the difference from it.
        """
        self.inputs, self._workers, self._allow_nonfinite = inputs, workers, allow_nonfinite
        self._costs, self._reference = costs or CostMeter(inputs), reference
        self.device = inputs.options.device or "cpu"
        load_linear_algebra(self.device)

    def measure(
        self, weights: Sequence[PlannedWeight], costed: Container[str]
    ) -> Iterator[tuple[PlannedWeight, Measured]]:
        """Measure every weight.

        Args:
            weights: the weights to read, in the order of the results.
            costed: the names of the weights whose costs to measure.

        Raises:
            InputError: a tensor cannot be read, a model lacks it, a number is not finite, or integers differ
                between the models.
        """
        return self._each("measure", weights, partial(self._measure, costed))

    def average(
        self,
        weights: Sequence[PlannedWeight],
        routed: Container[str] | None,
        costed: Container[str],
    ) -> Iterator[tuple[PlannedWeight, Averaged]]:
        """Measure and average every weight.

        Args:
            weights: the weights to read, in the order of the results.
            routed: the names of the routed weights; None while routing is undecided.
            costed: the names of the weights whose costs to measure.

        Raises:
            InputError: see `measure`; or a number is infinite in the output dtype.
        """
        return self._each("measure and average", weights, partial(self._average, routed, costed))

    def measure_low_rank(
        self, weights: Sequence[PlannedWeight], models: Sequence[ModelReference]
    ) -> Iterator[tuple[PlannedWeight, dict[ModelReference, Tensor]]]:
        """Measure the costs of some experts as low rank plus sparse, see `Measured`.

        Args:
            weights: the weights to read, in the order of the results; none of them is a buffer.
            models: the experts.

        Raises:
            InputError: a tensor cannot be read.
        """

        def measured(weight: PlannedWeight) -> dict[ModelReference, Tensor]:
            name = weight.info.name
            base = self.inputs.load(weight, self.inputs.base)
            origin = base if self._reference is None else self._reference(name)
            square, costs = squared_norm(base), {}
            for model in models:
                (difference,) = task_vectors(
                    origin, [self.inputs.load(weight, model, base)], self.device
                )
                costs[model] = self._costs.low_rank(weight, model, difference, square)
            return costs

        return self._each("decompose", weights, measured) if weights else iter(())

    def _each(
        self,
        description: str,
        weights: Sequence[PlannedWeight],
        function: Callable[[PlannedWeight], Any],
    ) -> Iterator[tuple[PlannedWeight, Any]]:
        """Apply a function to every weight; yield the weights with the results in order."""
        sizes = {weight.info.name: self.inputs.input_bytes(weight) for weight in weights}
        with bytes_bar(description, sum(sizes.values()), self.inputs.options.quiet) as bar:
            results = self._workers(function, weights, lambda weight: sizes[weight.info.name])
            for weight, result in zip(weights, results, strict=True):
                bar.set_postfix_str(weight.info.name, refresh=False)
                yield weight, result
                bar.update(sizes[weight.info.name])

    def _measure(self, costed: Container[str], weight: PlannedWeight) -> Measured:
        base = self.inputs.load(weight, self.inputs.base)
        if not base.is_floating_point():
            self._check_buffer(weight, base)
            return Measured(Conflict(), ())
        if weight.info.name in costed:
            return self._read(costed, weight, base, False, self.inputs.config.denoise).measured
        accumulator = Accumulator(base, self.inputs.config.denoise, self.device)
        for _ in self._task_vectors(weight, base, accumulator):
            pass
        return Measured(accumulator.conflict(), ())

    def _average(
        self, routed: Container[str] | None, costed: Container[str], weight: PlannedWeight
    ) -> Averaged:
        base = self.inputs.load(weight, self.inputs.base)
        if not base.is_floating_point():
            self._check_buffer(weight, base)
            buffer = base.to("cpu", copy=True)
            return Averaged(Measured(Conflict(), ()), (), DenseVersions(buffer, buffer))
        config = self.inputs.config
        denoise = config.denoise if config.conflict == "sign" else None
        return self._read(costed, weight, base, True, denoise, routed)

    def _read(
        self,
        costed: Container[str],
        weight: PlannedWeight,
        base: Tensor,
        with_directions: bool,
        denoise: float | None,
        routed: Container[str] | None = None,
    ) -> Averaged:
        """Read every expert's version of a weight once, and once more if random signs of it have costs."""
        inputs, name = self.inputs, weight.info.name
        accumulator = Accumulator(base, denoise, self.device)
        shares = [weight.shares[model] for model in inputs.experts]
        # the accumulator has the plain sum of the task vectors already
        equal = len(set(shares)) == 1 and not self._allow_nonfinite
        weighted = None if equal else WeightedSum(base, shares, self.device)
        with_directions = with_directions and is_measured(base.shape, inputs.hidden_size)
        reference = None if self._reference is None else self._reference(name)
        costs: list[dict[RateForm, Tensor]] = []
        square = squared_norm(base) if name in costed else 0.0
        directions: list[Tensor] = []
        widest = base.dtype
        for model, expert, tau in self._task_vectors(weight, base, accumulator):
            widest = torch.promote_types(widest, expert.dtype)
            if weighted is not None:
                weighted.add(expert)
            stored = tau
            if reference is not None and name in costed:
                (stored,) = task_vectors(reference, [expert], self.device)
            del expert  # frees it before the next one is loaded
            if name in costed:
                costs.append({})
                if self._costs.decomposes(name):
                    costs[-1]["low_rank"] = self._costs.low_rank(weight, model, stored, square)
            del stored
            if with_directions:
                directions.append(leading_directions(tau).cpu())
        total = accumulator.total if weighted is None else weighted.total
        conflict = accumulator.conflict()
        del accumulator, weighted
        if reference is not None:
            merged = narrowed(reference, self._dtype(weight, widest), name).cpu()
            dense = DenseVersions(merged, merged)
        else:
            dense = self._dense(weight, base, total, routed, widest)
        del total
        if costs and self._costs.measures_signs:
            for model, of_expert in zip(inputs.experts, costs, strict=True):
                of_expert["random_sign"] = self._costs.random_sign(
                    weight, model, dense.routed, square
                )
        return Averaged(Measured(conflict, tuple(costs)), tuple(directions), dense)

    def _task_vectors(
        self, weight: PlannedWeight, base: Tensor, accumulator: Accumulator
    ) -> Iterator[tuple[ModelReference, Tensor, Tensor]]:
        """Add every expert to the accumulator; yield the expert, its weight and its task vector."""
        for model in self.inputs.experts:
            expert = self.inputs.load(weight, model, base)
            if not expert.is_floating_point():
                raise InputError(
                    f"{weight.info.name}: {expert.dtype} in {model}, but {base.dtype} in the base: "
                    "convert one of them"
                )
            tensors = {self.inputs.base: base, model: expert}
            for owner, tensor in tensors.items():
                check_range(tensor, torch.float32, f"{weight.info.name} of {owner}")
            tau = accumulator.add(expert)
            if not accumulator.finite and not self._allow_nonfinite:
                self._refuse_nonfinite(weight, tensors)
                change = expert.to(torch.float32) - base.to(torch.float32)
                if not bool(change.isfinite().all()):
                    where = f"{weight.info.name}: the change in {model}"
                    raise range_error(where, math.inf, torch.float32)
            del tensors, tensor
            yield model, expert, tau
            del expert, tau

    @staticmethod
    def _refuse_nonfinite(weight: PlannedWeight, tensors: dict[ModelReference, Tensor]) -> None:
        for owner, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise InputError(
                    f"{weight.info.name}: NaN or infinity in {owner}: repair the model, or run "
                    "`mergekit-mediator merge --allow-nonfinite`"
                )

    def _check_buffer(self, weight: PlannedWeight, base: Tensor) -> None:
        """Refuse a buffer whose integers differ between the models."""
        try:
            for model in self.inputs.experts:
                expert = self.inputs.load(weight, model, base)
                copy_non_floating_buffer([base, expert], weight.info.name)
        except (TypeError, ValueError) as error:
            raise InputError(f"{weight.info.name}: {first_line(error)}") from error

    def _dtype(self, weight: PlannedWeight, widest: torch.dtype) -> torch.dtype:
        """The dtype of a weight of the dense expert, given the widest one of the models."""
        return dtype_from_name(weight.info.force_dtype or self.inputs.out_dtype) or widest

    def _dense(
        self,
        weight: PlannedWeight,
        base: Tensor,
        total: Tensor,
        routed: Container[str] | None,
        widest: torch.dtype,
    ) -> DenseVersions:
        dtype = self._dtype(weight, widest)
        shares = [weight.shares[model] for model in self.inputs.experts]
        averaged_scale = weight.scale
        routed_scale = 0.0 if self.inputs.config.reference == "base" else 1.0
        if routed is not None:
            scale = routed_scale if weight.info.name in routed else averaged_scale
            averaged_scale = routed_scale = scale

        name, finite = weight.info.name, not self._allow_nonfinite

        def version(scale: float) -> Tensor:
            if scale:
                return on_base(base, total, shares, scale, dtype, name, finite).cpu()
            return narrowed(base, dtype, name).cpu()

        averaged = version(averaged_scale)
        if routed_scale == averaged_scale:
            return DenseVersions(averaged, averaged)
        return DenseVersions(averaged, version(routed_scale))
