"""A pass over the weights of all models: read, check, measure, and average them one by one."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from mergekit.common import dtype_from_name
from mergekit.merge_methods.buffers import copy_non_floating_buffer
from torch import Tensor
from tqdm import tqdm

from mergekit_mediator import budget, conflict
from mergekit_mediator.conflict import Conflict
from mergekit_mediator.dense import average
from mergekit_mediator.errors import InputError
from mergekit_mediator.headers import first_line
from mergekit_mediator.planner import PlannedWeight
from mergekit_mediator.threshold import chunks
from mergekit_mediator.weights import Inputs
from mergekit_mediator.workers import Map


@dataclass(frozen=True)
class Measured:
    """What a pass finds of one weight.

    Attributes:
        conflict: of the experts' task vectors.
        costs: by expert, the bits that its task vector would take at each slope; see `budget.cost`.
    """

    conflict: Conflict
    costs: tuple[Tensor, ...] = ()


class Passes:
    """Reads the weights of a merge, as often as it is asked to."""

    def __init__(self, inputs: Inputs, over: Map, allow_nonfinite: bool = False) -> None:
        """
        Args:
            inputs: opened.
            over: what runs the independent parts; see `workers`.
            allow_nonfinite: accept NaN and infinity.
        """
        self.inputs, self.over, self._allow_nonfinite = inputs, over, allow_nonfinite
        self.device = inputs.options.device or "cpu"
        self._finite: set[str] = set()

    def read(
        self, weights: Iterable[PlannedWeight], description: str
    ) -> Iterator[tuple[PlannedWeight, Tensor, list[Tensor]]]:
        """Each weight with the base's tensor and those of all experts, under a bar that names it.

        Raises:
            InputError: a tensor that cannot be read, that is not everywhere, or not finite.
        """
        weights = list(weights)
        sizes = [self.inputs.input_bytes(weight) for weight in weights]
        with tqdm(
            total=sum(sizes),
            desc=description,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=self.inputs.options.quiet,
        ) as bar:
            for weight, size in zip(weights, sizes, strict=True):
                bar.set_postfix_str(weight.info.name, refresh=False)
                base, experts = self.inputs.load(weight)
                self._check_finite(weight, [base, *experts])
                yield weight, base, experts
                bar.update(size)

    def measure(self, weights: Iterable[PlannedWeight], with_costs: bool) -> dict[str, Measured]:
        """The conflict of every weight by name, and what storing it would cost."""
        measured = {}
        for weight, base, experts in self.read(weights, "measure"):
            costs: tuple[Tensor, ...] = ()
            if with_costs and base.is_floating_point():
                costs = tuple(self.over(partial(_cost, base), experts))
            measured[weight.info.name] = Measured(self.conflict(base, experts), costs)
        return measured

    def conflict(self, base: Tensor, experts: list[Tensor]) -> Conflict:
        """Of one weight; none for integers."""
        if not base.is_floating_point():
            return Conflict()
        denoise = self.inputs.config.denoise
        return conflict.measure(base, experts, denoise, self.device, self.over)

    def dense(
        self, weight: PlannedWeight, base: Tensor, experts: list[Tensor], routed: bool
    ) -> Tensor:
        """The dense expert's weight, on the CPU, in the output dtype.

        Raises:
            InputError: integers that differ between the models.
        """
        try:
            buffer: Tensor | None = copy_non_floating_buffer([base, *experts], weight.info.name)
        except (TypeError, ValueError) as error:
            raise InputError(f"{weight.info.name}: {first_line(error)}") from error
        if buffer is not None:
            return buffer.cpu()
        dtype = self._dtype(weight, base, experts)
        if routed and self.inputs.config.reference == "base":
            return base.to("cpu", dtype)
        shares = [weight.shares[model] for model in self.inputs.experts]
        scale = 1.0 if routed else weight.scale
        return average(base, experts, shares, scale, dtype, self.device, self.over).cpu()

    def _dtype(self, weight: PlannedWeight, base: Tensor, experts: list[Tensor]) -> torch.dtype:
        named: torch.dtype | None = dtype_from_name(
            weight.info.force_dtype or self.inputs.out_dtype
        )
        if named is not None:
            return named
        dtype = base.dtype
        for expert in experts:
            dtype = torch.promote_types(dtype, expert.dtype)
        return dtype

    def _check_finite(self, weight: PlannedWeight, tensors: list[Tensor]) -> None:
        if self._allow_nonfinite or weight.info.name in self._finite:
            return
        finite = self.over(_is_finite, tensors)
        for model, is_finite in zip(self.inputs.models, finite, strict=True):
            if not is_finite:
                raise InputError(
                    f"{weight.info.name}: NaN or infinity in {model}: mend the model, or run "
                    "`mergekit-mediator merge --allow-nonfinite`"
                )
        self._finite.add(weight.info.name)


def _cost(base: Tensor, expert: Tensor) -> Tensor:
    (tau,) = conflict.task_vectors(base, [expert])
    return budget.cost(tau)


def _is_finite(tensor: Tensor) -> bool:
    """A sum is finite unless a term is not, or it overflows; only then does each term need a look."""
    if not tensor.is_floating_point():
        return True
    flat = tensor.reshape(-1)
    return all(
        bool(flat[part].sum(dtype=torch.float32).isfinite()) or bool(flat[part].isfinite().all())
        for part in chunks(flat.numel())
    )
