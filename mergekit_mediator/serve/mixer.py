"""Mixtures of experts on the weights of one model: entered in place, left bit for bit."""

from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from threading import RLock, get_ident
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mergekit_mediator.delta.stored_weight import (
    Displaced,
    StoredWeight,
    displace,
    mix_,
    overwriting,
    restore_,
)
from mergekit_mediator.errors import MixtureError
from mergekit_mediator.models.locate import fingerprint, locate_weights
from mergekit_mediator.models.scope import scope, undoing
from mergekit_mediator.serve.mixture import Mixture, Named
from mergekit_mediator.serve.pool import Pool
from mergekit_mediator.serve.prefetch import read_ahead, side_streams
from mergekit_mediator.serve.residency import Experts, tensor_bytes
from mergekit_mediator.store.description import Description

T = TypeVar("T")


class Mixer:
    """Puts mixtures of experts into the routed weights of one model, one mixture at a time.

    One lock guards the weights. It is held for as long as a mixture is in place, so that another
    thread's request waits and never sees a foreign mixture; a thread that has it may take it again.
    """

    def __init__(
        self,
        model: nn.Module,
        experts: Experts,
        layers: Iterable[Sequence[str]] | None = None,
        parallel_from: int = 1 << 22,
    ) -> None:
        """
        Args:
            model: holding the dense expert.
            experts: the stored experts.
            layers: the weights of each routed layer, which are brought to a device together; each
                weight alone unless given.
            parallel_from: so many routed weights are put in place by several threads; for fewer, starting
                threads takes longer than what they save.

        Raises:
            MixtureError: the model was loaded in a form that experts cannot be put into.
        """
        self._model, self.experts, self.parallel_from = model, experts, parallel_from
        self._shapes: dict[str, tuple[int, ...]] = {}
        # by weight, the experts that change it, and whether they have a share in the dense weight
        self._changing: dict[str, list[tuple[str, bool]]] = {}
        for expert, file in experts.files.items():
            for name, stored in file.weights.items():
                self._shapes[name] = stored.shape
                self._changing.setdefault(name, []).append((expert, bool(stored.share)))
        layers = layers or [[name] for name in self._shapes]
        self._layers = [[name for name in layer if name in self._shapes] for layer in layers]
        self.lock = RLock()
        self.rows: tuple[Mixture, ...] | None = None
        self._owner: int | None = None
        self._displaced: dict[str, Sequence[Displaced]] = {}
        self._pool: Pool[str] | None = None
        self._moved = False
        self._locate()

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
        """What decoded experts take in memory now, with what is remembered of them."""
        return self.experts.resident_bytes + sum(
            tensor_bytes(one.weights if isinstance(one, Displaced) else one)
            for _, made in self._memory.values()
            for one in (made if isinstance(made, list) else [made])
        )

    @property
    def weights(self) -> dict[str, Tensor]:
        """The routed weights in the model, by the checkpoint's names."""
        if self._fingerprint != fingerprint(self._model):  # moved or cast since
            self._locate()
        return self._weights

    @scope
    def mixture(self, named: Named) -> Generator[None, None, None]:
        """W(p) = W_dense + Σ_t p_t Δ_t inside the context, the dense expert's bits after it.

        Whatever ends the context, and wherever entering it is interrupted, the dense weights come
        back: each is saved before it is written. Other threads wait until the context is left.

        Raises:
            MixtureError: see `Mixture.of`; or a mixture inside another one.
        """
        mixture = Mixture.of(named, self.names)
        with self.hold((mixture,)):
            self._enter(mixture)
            yield

    @scope
    def hold(self, rows: tuple[Mixture, ...]) -> Generator[None, None, None]:
        """Keep other threads out; `rows` are the mixtures of the batch's rows, or one for all.

        Raises:
            MixtureError: this thread is inside a mixture already.
        """
        with self.lock:
            if self.rows is not None:
                names = ", ".join(sorted({name for row in self.rows for name in row.names}))
                raise MixtureError(
                    f"a mixture of {names or 'no expert'} is in place already: leave it before "
                    "entering another"
                )
            self._restore()  # an error may have kept an earlier mixture in place
            with undoing(self._leave):
                self.rows, self._owner = rows, get_ident()
                yield

    def expert(self, name: str) -> dict[str, StoredWeight]:
        """What one expert keeps of each routed weight."""
        weights, file = self.weights, self.experts.files[name]
        return {w: self.experts.read(name, w, weights[w].device) for w in file.weights}

    def parts(self, weight: str, mixture: Mixture) -> list[tuple[str, float, StoredWeight]]:
        """The experts that change a weight in a mixture, each with its coefficient: those in the mixture,
        and those that the dense weight is a mean of, as far as they are stored relative to the base."""
        device, total, parts = self._weights[weight].device, mixture.total, []
        for name in self._takes_part(weight, mixture):
            stored = self.experts.read(name, weight, device)
            parts.append((name, stored.coefficient(mixture.weight(name), total), stored))
        return parts

    def described(self, weight: str, mixture: Mixture) -> list[Description]:
        """What the files say about `parts`; nothing is read."""
        names = self._takes_part(weight, mixture)
        return [self.experts.files[name].weights[weight] for name in names]

    def _takes_part(self, weight: str, mixture: Mixture) -> list[str]:
        return [
            name
            for name, shares in self._changing[weight]
            if name in mixture or (shares and not mixture.is_dense)
        ]

    def _enter(self, mixture: Mixture) -> None:
        weights = self.weights
        if mixture.is_dense:
            return
        if self._on_cpu:
            alone = mixture.alone or ""

            def put(name: str) -> None:
                ready = self._ready.get((alone, name))
                if ready is None:
                    self._put(name, self.parts(name, mixture))
                else:
                    self._displaced[name], overwrite = ready
                    overwrite()

            self._over(put, weights)
            return

        def read(layer: Sequence[str]) -> list[list[tuple[str, float, StoredWeight]]]:
            return [self.parts(name, mixture) for name in layer]

        streams = side_streams({weight.device for weight in weights.values()})
        for layer, parts in read_ahead(self._layers, read, streams):
            for name, found in zip(layer, parts, strict=True):
                self._put(name, found)

    def _put(self, name: str, found: list[tuple[str, float, StoredWeight]]) -> None:
        """Put the experts of a mixture into a weight, whose dense values are saved first."""
        if not found:
            return
        weight, parts = self._weights[name], [(c, stored) for _, c, stored in found]
        if any(stored.factors for _, stored in parts):
            saved = self.remember(("dense", name), weight, lambda: displace(weight, parts))
        else:
            saved = [
                one
                for expert, _, stored in found
                for one in self.remember(
                    ("dense", expert, name), stored, partial(displace, weight, [(1.0, stored)])
                )
            ]
        self._displaced[name] = saved
        mix_(weight, parts, saved)
        if len(found) == 1 and self._unbounded:
            expert, _, stored = found[0]
            overwrite = overwriting(weight, stored)
            if overwrite is not None:
                self._ready[expert, name] = saved, overwrite

    @property
    def _unbounded(self) -> bool:
        """Whether memory may be taken to enter mixtures faster."""
        return self.experts.residency == "device" and self.experts.budget is None

    def remember(self, key: tuple[str, ...], of: object, make: Callable[[], T]) -> T:
        """What `make` gives of something; kept as long as that and the dense weights are, unless
        memory is bounded. Dense weights never change, so that what a mixture displaces is saved once."""
        known = self._memory.get(key)
        if known is not None and known[0] is of:
            result: T = known[1]
            return result
        result = make()
        if self._unbounded:
            self._memory[key] = (of, result)
        return result

    def _leave(self) -> None:
        """Put the dense expert back. May be interrupted, and repeated."""
        try:
            self._restore()
        finally:
            self.rows = self._owner = None

    def _restore(self) -> None:
        if self._pool is not None:
            self._pool.stop()
        if self._displaced:
            if self._fingerprint != fingerprint(self._model):
                self._moved = True  # or cast, inside the mixture
                self._locate()
            self._over(self._restore_one, list(self._displaced))
        self._moved = False

    def _restore_one(self, name: str) -> None:
        if self._moved:
            self._weights[name].copy_(self.experts.dense(name))
        else:
            restore_(self._weights[name], self._displaced[name])
        del self._displaced[name]

    @property
    def _on_cpu(self) -> bool:
        return all(weight.device.type == "cpu" for weight in self._weights.values())

    def _over(self, function: Callable[[str], None], names: Iterable[str]) -> None:
        """Call a function with each name, on all cores where that is worth it."""
        ordered, threads = list(names), torch.get_num_threads()
        numel = sum(self._weights[name].numel() for name in ordered)
        if threads > 1 and numel >= self.parallel_from and self._on_cpu:
            self._pool = Pool(function, ordered, threads)  # known before any thread of it
            self._pool.run()
        else:
            for name in ordered:
                function(name)

    def _locate(self) -> None:
        self._weights = locate_weights(self._model, self._shapes, self._shapes)
        self._memory: dict[tuple[str, ...], tuple[object, Any]] = {}
        # by expert and weight: what it displaces when it is alone, and what puts it there
        self._ready: dict[tuple[str, str], tuple[Sequence[Displaced], Callable[[], None]]] = {}
        self._fingerprint = fingerprint(self._model)
