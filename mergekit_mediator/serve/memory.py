"""Tensors that entering a mixture makes once and needs again, as long as memory is not bounded."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor

from mergekit_mediator.delta.stored_weight import Displaced
from mergekit_mediator.serve.residency import tensor_bytes

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

# An expert and a weight, by their names.
ExpertWeight = tuple[str, str]
Saved = Sequence[Displaced]


class Remembered(Generic[K, T]):
    """Results by key, each valid as long as the object that it was made of."""

    def __init__(self, bounded: bool) -> None:
        """`bounded` keeps nothing."""
        self._bounded = bounded
        self._results: dict[K, tuple[object, T]] = {}

    def get(self, key: K, source: object, make: Callable[[], T]) -> T:
        """The result of `make`, called unless it was called before for the same key and source."""
        remembered = self._results.get(key)
        if remembered is not None and remembered[0] is source:
            return remembered[1]
        result = make()
        if not self._bounded:
            self._results[key] = source, result
        return result

    def values(self) -> list[T]:
        """All results."""
        return [result for _, result in self._results.values()]


@dataclass
class Memory:
    """Everything that is remembered of one model's weights; a new one is begun when they are moved or cast.

    Dense weights never change, so the dense values that a mixture displaces are saved once.

    Attributes:
        bounded: remember nothing.
        whole: by weight, all its dense values.
        displaced: the dense values at the positions that an expert keeps.
        matrices: the sparse part of an expert as a matrix, see `row_modules.sparse_matrix`.
        ready: for an expert that is put in place alone without arithmetic, the dense values that it
            displaces, and the call that puts it there.
    """

    bounded: bool
    ready: dict[ExpertWeight, tuple[Saved, Callable[[], None]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.whole: Remembered[str, Saved] = Remembered(self.bounded)
        self.displaced: Remembered[ExpertWeight, Saved] = Remembered(self.bounded)
        self.matrices: Remembered[ExpertWeight, Tensor] = Remembered(self.bounded)

    @property
    def bytes(self) -> int:
        """The size of all that is remembered."""
        saved = [*self.whole.values(), *self.displaced.values()]
        dense = sum(tensor_bytes(one.weights) for displaced in saved for one in displaced)
        return dense + sum(map(tensor_bytes, self.matrices.values()))
