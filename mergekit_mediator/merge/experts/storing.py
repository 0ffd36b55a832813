"""The pass that encodes every expert's version of every routed weight. Each worker reads one of them at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

from mergekit.common import ModelReference
from torch import Tensor

from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.merge.loaders import OpenInputs
from mergekit_mediator.merge.planner import PlannedWeight
from mergekit_mediator.merge.progress import bytes_bar
from mergekit_mediator.merge.workers import Workers
from mergekit_mediator.store.codec import encode_bytes
from mergekit_mediator.store.description import Description

Load = Callable[[ModelReference], Tensor]
Encoded = tuple[Tensor, Description]
Encode = Callable[[PlannedWeight, ModelReference, Tensor, Load], StoredWeight | None]


def encode_experts(
    inputs: OpenInputs,
    workers: Workers,
    weights: Sequence[PlannedWeight],
    out: Path,
    encode: Encode,
) -> Iterator[tuple[PlannedWeight, ModelReference, Encoded | None]]:
    """Encode every expert's version of every routed weight.

    Args:
        inputs: the models, entered.
        workers: the threads of the pass.
        weights: the routed weights, in the order of the results.
        out: the directory of the dense expert.
        encode: encodes a weight of an expert; its arguments are those of `Encoder.encode`.

    Yields:
        The weight, the expert, and the encoded weight; None instead of the latter if the expert stores
        nothing.

    Raises:
        InputError: see `OpenInputs.load` and `encode`.
    """
    written = inputs.reader(out)
    sizes = [[inputs.input_bytes(w, [model]) for model in inputs.experts] for w in weights]

    def items() -> Iterator[_Item]:
        for weight, by_expert in zip(weights, sizes, strict=True):
            base = _Once(partial(inputs.load, weight, inputs.base))
            dense = _Once(partial(written, weight.info.name))
            for model, size in zip(inputs.experts, by_expert, strict=True):
                yield _Item(weight, model, size, base, dense)

    def encoded(item: _Item) -> tuple[_Item, Encoded | None]:
        weight, dense = item.weight, item.dense()
        if not dense.is_floating_point():
            return item, None

        def load(model: ModelReference) -> Tensor:
            return item.base() if model == inputs.base else inputs.load(weight, model, dense)

        stored = encode(weight, item.model, dense, load)
        return item, None if stored is None else encode_bytes(stored, dense)

    with bytes_bar("store", sum(map(sum, sizes)), inputs.options.quiet) as bar:
        for item, stored in workers(encoded, items(), lambda item: item.size):
            bar.set_postfix_str(f"{item.weight.info.name} of {item.model}", refresh=False)
            yield item.weight, item.model, stored
            bar.update(item.size)


@dataclass(frozen=True)
class _Item:
    """One expert's version of one weight, with the base's and the dense expert's weight; `size` in bytes."""

    weight: PlannedWeight
    model: ModelReference
    size: int
    base: "_Once"
    dense: "_Once"


class _Once:
    """A tensor that workers share. The first call loads it; it stays in memory while an item refers to it."""

    def __init__(self, load: Callable[[], Tensor]) -> None:
        self._load, self._lock = load, Lock()
        self._tensor: Tensor | None = None

    def __call__(self) -> Tensor:
        with self._lock:
            if self._tensor is None:
                self._tensor = self._load()
            return self._tensor
