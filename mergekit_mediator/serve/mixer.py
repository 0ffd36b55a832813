"""Keep one mixture at a time on one model; a lock keeps other threads out."""

from collections.abc import Generator, Iterable, Sequence
from threading import RLock, get_ident

from torch import nn

from mergekit_mediator.errors import MixtureError
from mergekit_mediator.models.scope import scope, undoing
from mergekit_mediator.serve.mixture import Mixture, Named
from mergekit_mediator.serve.placer import Placer
from mergekit_mediator.serve.residency import Experts
from mergekit_mediator.serve.stream_order import StreamOrder


class Mixer:
    """Put mixtures of experts into the routed weights of one model, one mixture at a time.

    One lock guards the weights. A thread holds it for as long as its mixture is in place, so that another
    thread's request waits and never sees a foreign mixture. A thread that holds the lock may take it again.

    Attributes:
        experts: the stored experts.
        placer: the writer of the weights.
        lock: the lock of the weights.
        rows: the mixtures of the batch's rows, or one mixture for all rows; None outside of a mixture.
    """

    def __init__(
        self,
        model: nn.Module,
        experts: Experts,
        layers: Iterable[Sequence[str]] | None = None,
        parallel_from: int = 1 << 22,
    ) -> None:
        """Take the arguments of `placer.Placer`."""
        self.experts = experts
        self.placer = Placer(model, experts, layers, parallel_from)
        self.lock = RLock()
        self.rows: tuple[Mixture, ...] | None = None
        self._owner: int | None = None
        self._order = StreamOrder()

    @property
    def names(self) -> tuple[str, ...]:
        """The experts, in the artifact's order."""
        return tuple(self.experts.files)

    @property
    def inside(self) -> bool:
        """Whether this thread is inside a mixture."""
        return self.rows is not None and self._owner == get_ident()

    @property
    def resident_bytes(self) -> int:
        """The bytes that decoded experts and remembered tensors take now."""
        return self.experts.resident_bytes + self.placer.memory.bytes

    @scope
    def mixture(self, named: Named) -> Generator[nn.Module, None, None]:
        """Put W(p) = W_dense + Σ_t p_t Δ_t in place inside the context, and the dense expert back after it.

        The dense weights come back bit for bit, whatever ends the context and wherever an interrupt
        falls: each weight is saved before it is written. Other threads wait until the context ends.

        Yields:
            The model.

        Raises:
            MixtureError: see `Mixture.of`; or a mixture is in place already.
        """
        mixture = Mixture.of(named, self.names)
        with self.hold((mixture,)):
            self.placer.put(mixture)
            yield self.placer.model

    @scope
    def turn(self) -> Generator[None, None, None]:
        """Keep other threads out, and kernels of other CUDA streams that use the weights."""
        with self.lock:
            self._order.begin()
            try:
                yield
            finally:
                self._order.end(lambda: self.placer.devices)

    @scope
    def hold(self, rows: tuple[Mixture, ...]) -> Generator[None, None, None]:
        """Keep other threads out; `rows` has the mixtures of the batch's rows, or one for all rows.

        Raises:
            MixtureError: this thread is inside a mixture already.
        """
        with self.turn():
            if self.rows is not None:
                names = ", ".join(sorted({name for row in self.rows for name in row.names}))
                raise MixtureError(
                    f"a mixture of {names or 'no expert'} is in place already: leave it before "
                    "entering another"
                )
            self.open(rows)
            self.placer.restore()  # an error may have kept an earlier mixture in place
            with undoing(self._leave):
                self.rows, self._owner = rows, get_ident()
                yield

    def open(self, rows: Iterable[Mixture]) -> None:
        """Open the files that these mixtures need, which are fetched where they are not there.

        Raises:
            ArtifactError: a file cannot be fetched or read.
        """
        with self.lock:
            for row in rows:
                self.placer.open(row.names)

    def _leave(self) -> None:
        """Put the dense expert back. An interrupted call may be repeated."""
        try:
            self.placer.restore()
        finally:
            self.rows = self._owner = None
