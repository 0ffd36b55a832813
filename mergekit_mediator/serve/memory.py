"""Remember tensors that entering a mixture makes once and needs again, unless memory is bounded."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor

from mergekit_mediator.delta.again import Step
from mergekit_mediator.delta.mixing import Displaced
from mergekit_mediator.serve.residency import tensor_bytes
from mergekit_mediator.serve.sparse_rows import SparseRows

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

# The names of an expert and of a weight.
ExpertWeight = tuple[str, str]
Saved = Sequence[Displaced]


class Remembered(Generic[K, T]):
    """Results by key; each is valid for the object that it was made from."""

    def __init__(self, bounded: bool) -> None:
        """Start empty; with `bounded`, no result is remembered."""
        self._bounded = bounded
        self._results: dict[K, tuple[object, T]] = {}

    def get(self, key: K, source: object, make: Callable[[], T]) -> T:
        """Return the result of `make`, which is called once for each key and source."""
        remembered = self._results.get(key)
        if remembered is not None and remembered[0] is source:
            return remembered[1]
        result = make()
        if not self._bounded:
            self._results[key] = source, result
        return result

    def values(self) -> list[T]:
        """List all results."""
        return [result for _, result in self._results.values()]


@dataclass
class Memory:
    """The tensors remembered for one model's weights; moved or cast weights need a new memory.

    Dense weights never change, so the dense values that a mixture displaces are saved once.

    Attributes:
        bounded: whether nothing is remembered.
        whole: all dense values of a weight, by its name.
        displaced: the dense values at the positions that an expert stores.
        matrices: the sparse part of an expert as a matrix, see `row_modules.sparse_matrix`.
        ready: for an expert that enters alone, the dense values that it displaces and the step that puts it in
            place again, by its name and that of the weight.
    """

    bounded: bool
    ready: dict[ExpertWeight, tuple[Saved, Step]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.whole: Remembered[str, Saved] = Remembered(self.bounded)
        self.displaced: Remembered[ExpertWeight, Saved] = Remembered(self.bounded)
        self.matrices: Remembered[ExpertWeight, Tensor | SparseRows] = Remembered(self.bounded)

    @property
    def bytes(self) -> int:
        """The bytes of all remembered tensors."""
        saved = [*self.whole.values(), *self.displaced.values()]
        dense = sum(tensor_bytes(one.weights) for displaced in saved for one in displaced)
        own = [step.tensors for _, step in list(self.ready.values())]
        own += [m.tensors if isinstance(m, SparseRows) else (m,) for m in self.matrices.values()]
        return dense + sum(tensor_bytes(tensor) for tensors in own for tensor in tensors)
