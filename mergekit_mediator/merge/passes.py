"""The two passes over the weights of a merge, which read one expert at a time.

The first measures and averages. Of the experts only sums are kept, so that memory does not grow with
their number. The second encodes what every expert keeps of the routed weights.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.merge_methods.buffers import copy_non_floating_buffer
from torch import Tensor
from tqdm import tqdm

from mergekit_mediator.delta.narrow import check_range, narrowed, range_error
from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.delta.tradeoff import tradeoff
from mergekit_mediator.errors import InputError, first_line
from mergekit_mediator.merge.conflict import Accumulator, Conflict
from mergekit_mediator.merge.inputs import Inputs
from mergekit_mediator.merge.planner import PlannedWeight
from mergekit_mediator.merge.workers import Workers
from mergekit_mediator.methods.weighted_mean import WeightedSum, on_base
from mergekit_mediator.route.response import is_measured, leading_directions
from mergekit_mediator.store.codec import encode_bytes
from mergekit_mediator.store.description import Description

Load = Callable[[ModelReference], Tensor]
Stored = tuple[PlannedWeight, ModelReference, tuple[Tensor, Description] | None]
Encode = Callable[[PlannedWeight, ModelReference, Tensor, Load], StoredWeight | None]


@dataclass(frozen=True)
class Measured:
    """What the first pass finds of one weight.

    Attributes:
        conflict: of the experts' task vectors.
        costs: by expert, what storing its task vector takes and leaves; see `tradeoff.tradeoff`.
        directions: `[n_experts, rank, in]` float16 for the response router, if it measures this weight.
        dense: the dense expert's weight on the CPU, in the output dtype: if it is averaged, under False,
            if it is routed, under True, or both as long as that is not known.
    """

    conflict: Conflict
    costs: tuple[Tensor, ...] = ()
    directions: Tensor | None = None
    dense: Mapping[bool, Tensor] = field(default_factory=dict)


class Passes:
    """Reads the weights of a merge, one expert of one weight at a time on each worker."""

    def __init__(self, inputs: Inputs, over: Workers, allow_nonfinite: bool = False) -> None:
        """
        Args:
            inputs: opened.
            over: what runs the independent parts; see `workers`.
            allow_nonfinite: accept NaN and infinity.
        """
        self.inputs, self._over, self._allow_nonfinite = inputs, over, allow_nonfinite
        self.device = inputs.options.device or "cpu"

    def first(
        self,
        weights: Sequence[PlannedWeight],
        routed: frozenset[str] | None = None,
        with_costs: bool = False,
        only_conflict: bool = False,
    ) -> Iterator[tuple[PlannedWeight, Measured]]:
        """Measure and average every weight.

        Args:
            weights: in the order of the results.
            routed: the names of the routed weights; None if that is not known yet.
            with_costs: also find what storing would cost, where it may be asked for.
            only_conflict: nothing else.

        Raises:
            InputError: a tensor that cannot be read, is not everywhere, is not finite or would not be in
                the output dtype, or holds integers that differ between the models.
        """
        sizes = {weight.info.name: self.inputs.input_bytes(weight) for weight in weights}
        measure = partial(self._measure, routed, with_costs, only_conflict)
        with self._bar(
            "measure" if only_conflict else "measure and average", sum(sizes.values())
        ) as bar:
            results = self._over(measure, weights, lambda weight: sizes[weight.info.name])
            for weight, measured in zip(weights, results, strict=True):
                bar.set_postfix_str(weight.info.name, refresh=False)
                yield weight, measured
                bar.update(sizes[weight.info.name])

    def second(
        self, weights: Sequence[PlannedWeight], out: Path, encode: Encode
    ) -> Iterator[Stored]:
        """What every expert stores of every weight, as `encode_bytes` gives it; None if nothing.

        Args:
            weights: the routed ones, in the order of the results.
            out: the directory of the dense expert.
            encode: given a weight, an expert, the dense weight, and what loads the weight of any model.
        """
        inputs, written = self.inputs, self.inputs.reader(out)
        sizes = [[inputs.input_bytes(w, [model]) for model in inputs.experts] for w in weights]

        def items() -> Iterator[_Item]:
            for weight, by_expert in zip(weights, sizes, strict=True):
                base = _Once(partial(inputs.load, weight, inputs.base))
                dense = _Once(partial(written, weight.info.name))
                for model, size in zip(inputs.experts, by_expert, strict=True):
                    yield _Item(weight, model, size, base, dense)

        def store(item: _Item) -> tuple[_Item, tuple[Tensor, Description] | None]:
            weight, dense = item.weight, item.dense()
            if not dense.is_floating_point():
                return item, None

            def load(model: ModelReference) -> Tensor:
                return item.base() if model == inputs.base else inputs.load(weight, model, dense)

            stored = encode(weight, item.model, dense, load)
            return item, None if stored is None else encode_bytes(stored, dense)

        with self._bar("store", sum(map(sum, sizes))) as bar:
            for item, stored in self._over(store, items(), lambda item: item.size):
                bar.set_postfix_str(f"{item.weight.info.name} of {item.model}", refresh=False)
                yield item.weight, item.model, stored
                bar.update(item.size)

    def _measure(
        self,
        routed: frozenset[str] | None,
        with_costs: bool,
        only_conflict: bool,
        weight: PlannedWeight,
    ) -> Measured:
        inputs, name = self.inputs, weight.info.name
        base = inputs.load(weight, inputs.base)
        if not base.is_floating_point():
            return Measured(Conflict(), dense=self._buffer(weight, base))
        found = Accumulator(base, inputs.config.denoise, self.device)
        shares = [weight.shares[model] for model in inputs.experts]
        weighted = None
        if self._allow_nonfinite or len(set(shares)) > 1:
            weighted = WeightedSum(base, shares, self.device)
        with_costs = with_costs and (routed is None or name in routed)
        with_directions = not only_conflict and is_measured(base.shape, inputs.hidden_size)
        costs: list[Tensor] = []
        directions: list[Tensor] = []
        dtype = base.dtype
        for model in inputs.experts:
            expert = inputs.load(weight, model, base)
            dtype = torch.promote_types(dtype, expert.dtype)
            tau = self._add(weight, found, model, base, expert)
            if weighted is not None:
                weighted.add(expert)
            del expert  # before the next one is loaded
            if with_costs:
                costs.append(tradeoff(tau.cpu(), importance=weight.importance))
            if with_directions:
                directions.append(leading_directions(tau).cpu())
        dense: dict[bool, Tensor] = {}
        if not only_conflict:
            total = found.total if weighted is None else weighted.total
            dense = self._dense(weight, base, total, routed, dtype)
        stacked = torch.stack(directions) if directions else None
        return Measured(found.conflict(), tuple(costs), stacked, dense)

    def _add(
        self,
        weight: PlannedWeight,
        found: Accumulator,
        model: ModelReference,
        base: Tensor,
        expert: Tensor,
    ) -> Tensor:
        if not expert.is_floating_point():
            raise InputError(
                f"{weight.info.name}: {expert.dtype} in {model}, {base.dtype} in the base"
            )
        for owner, tensor in ((self.inputs.base, base), (model, expert)):
            check_range(tensor, torch.float32, f"{weight.info.name} of {owner}")
        tau = found.add(expert)
        if not found.finite and not self._allow_nonfinite:
            for owner, tensor in ((self.inputs.base, base), (model, expert)):
                if not bool(tensor.isfinite().all()):
                    raise InputError(
                        f"{weight.info.name}: NaN or infinity in {owner}: mend the model, or run "
                        "`mergekit-mediator merge --allow-nonfinite`"
                    )
            change = expert.to(torch.float32) - base.to(torch.float32)
            if not bool(change.isfinite().all()):
                where = f"{weight.info.name}: the change in {model}"
                raise range_error(where, math.inf, torch.float32)
        return tau

    def _buffer(self, weight: PlannedWeight, base: Tensor) -> dict[bool, Tensor]:
        """Integers, which must be the same in all models."""
        try:
            for model in self.inputs.experts:
                expert = self.inputs.load(weight, model, base)
                copy_non_floating_buffer([base, expert], weight.info.name)
        except (TypeError, ValueError) as error:
            raise InputError(f"{weight.info.name}: {first_line(error)}") from error
        return dict.fromkeys((False, True), base.to("cpu", copy=True))

    def _dense(
        self,
        weight: PlannedWeight,
        base: Tensor,
        total: Tensor,
        routed: frozenset[str] | None,
        widest: torch.dtype,
    ) -> dict[bool, Tensor]:
        """The dense expert's weight as each outcome of routing wants it; one tensor where all want the same."""
        dtype = dtype_from_name(weight.info.force_dtype or self.inputs.out_dtype) or widest
        shares = [weight.shares[model] for model in self.inputs.experts]
        of_base = self.inputs.config.reference == "base"
        scales = {False: weight.scale, True: 0.0 if of_base else 1.0}
        if routed is not None:
            is_routed = weight.info.name in routed
            scales = {is_routed: scales[is_routed]}
        name, finite = weight.info.name, not self._allow_nonfinite
        made = {
            scale: on_base(base, total, shares, scale, dtype, name, finite).cpu()
            if scale
            else narrowed(base, dtype, name).cpu()
            for scale in set(scales.values())
        }
        return {is_routed: made[scale] for is_routed, scale in scales.items()}

    @contextmanager
    def _bar(self, description: str, size: int) -> "Iterator[tqdm[Any]]":
        with tqdm(
            total=size,
            desc=description,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=self.inputs.options.quiet,
        ) as bar:
            yield bar


@dataclass(frozen=True)
class _Item:
    """One expert's version of one weight, with what all its versions are compared with."""

    weight: PlannedWeight
    model: ModelReference
    size: int
    base: "_Once"
    dense: "_Once"


class _Once:
    """A tensor for all workers that ask: loaded by the first, in memory while anyone may ask."""

    def __init__(self, load: Callable[[], Tensor]) -> None:
        self._load, self._lock = load, Lock()
        self._tensor: Tensor | None = None

    def __call__(self) -> Tensor:
        with self._lock:
            if self._tensor is None:
                self._tensor = self._load()
            return self._tensor
