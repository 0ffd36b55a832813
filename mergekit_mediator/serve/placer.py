"""Put mixtures of experts into the routed weights of a model, and the dense expert back, bit for bit."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mergekit_mediator.delta.again import Adding, Overwriting, Step
from mergekit_mediator.delta.mixing import Displaced, displace, mix_, restore_
from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.models.locate import fingerprint, locate_weights
from mergekit_mediator.serve.memory import Memory
from mergekit_mediator.serve.mixture import Mixture
from mergekit_mediator.serve.pool import Pool
from mergekit_mediator.serve.prefetch import read_ahead, side_streams
from mergekit_mediator.serve.residency import Experts
from mergekit_mediator.store.description import Description

# An expert's name, its coefficient in a mixture, and its stored weight.
Part = tuple[str, float, StoredWeight]


class Placer:
    """Write mixtures into one model's weights, without a lock: `mixer.Mixer` holds it.

    Attributes:
        model: the model; it holds the dense expert outside mixtures.
        experts: the stored experts.
        parallel_from: from so many parameters on, several threads put a mixture in place; for fewer, starting
            threads takes more time than they save.
        memory: the tensors that are needed again.
    """

    def __init__(
        self,
        model: nn.Module,
        experts: Experts,
        layers: Iterable[Sequence[str]] | None = None,
        parallel_from: int = 1 << 22,
    ) -> None:
        """Find the routed weights in a model.

        Args:
            model: the model; it holds the dense expert.
            experts: the stored experts.
            layers: the names of each routed layer's weights, which go to a device together; by default
                each weight is its own layer.
            parallel_from: see above.

        Raises:
            MixtureError: experts cannot be put into the model, because it is quantised or its weights
                have another shape.
        """
        self.model, self.experts, self.parallel_from = model, experts, parallel_from
        self._shapes: dict[str, tuple[int, ...]] = {}
        # By weight: each expert that changes it, and whether the expert has a share in the dense weight.
        self._changes: dict[str, list[tuple[str, bool]]] = {}
        self._open_experts: set[str] = set()
        self._all_layers = None if layers is None else [list(layer) for layer in layers]
        self._displaced: dict[str, Sequence[Displaced]] = {}
        self._pool: Pool[str] | None = None
        self._moved = False
        self._locate()
        self.open(())

    def open(self, names: Iterable[str]) -> None:
        """Open the files that a mixture of these experts needs, if they are not open yet.

        Raises:
            ArtifactError: a file cannot be fetched or read.
            MixtureError: the model was loaded in a form that experts cannot be put into.
        """
        if self._open_experts and self._open_experts.issuperset(names):
            return
        needed = self._open_experts.union(self.experts.needed(names))
        shapes: dict[str, tuple[int, ...]] = {}
        changes: dict[str, list[tuple[str, bool]]] = {}
        for expert in self.experts.files:
            if expert in needed:
                for name, stored in self.experts.files[expert].weights.items():
                    shapes[name] = stored.shape
                    changes.setdefault(name, []).append((expert, bool(stored.share)))
        self._shapes, self._changes = shapes, changes
        self._locate()
        self._open_experts = needed  # last, so that an interrupted call is repeated

    @property
    def weights(self) -> dict[str, Tensor]:
        """The routed weights in the model, by the checkpoint's names."""
        if self._fingerprint != fingerprint(self.model):  # someone has moved or cast the model
            self._locate()
        return self._weights

    @property
    def devices(self) -> set[torch.device]:
        """The devices of the routed weights."""
        # `restore` must see by itself that someone has moved the model inside a mixture
        weights = self._weights if self._displaced else self.weights
        return {weight.device for weight in weights.values()}

    def expert(self, name: str) -> dict[str, StoredWeight]:
        """Return the stored weights of one expert by name, on the devices of the model's weights."""
        weights, file = self.weights, self.experts.files[name]
        return {w: self.experts.read(name, w, weights[w].device) for w in file.weights}

    def parts(self, weight: str, mixture: Mixture) -> list[Part]:
        """List the experts that change a weight in a mixture, each with its coefficient.

        These are the mixture's experts. Where experts are stored relative to the base, those that have a
        share in the dense weight change it too.
        """
        device, total, parts = self._weights[weight].device, mixture.total, []
        for name in self._takes_part(weight, mixture):
            stored = self.experts.read(name, weight, device)
            parts.append((name, stored.coefficient(mixture.weight(name), total), stored))
        return parts

    def described(self, weight: str, mixture: Mixture) -> list[Description]:
        """List the descriptions of `parts`, from the headers of the experts' files; no tensor is read."""
        names = self._takes_part(weight, mixture)
        return [self.experts.files[name].weights[weight] for name in names]

    def put(self, mixture: Mixture) -> None:
        """Put a mixture in place; each dense weight is saved before it is written."""
        weights = self.weights
        if mixture.is_dense:
            return
        if self._on_cpu:
            self._each(partial(self._put_weight, mixture), weights)
            return

        waiting = [[n for n in layer if not self._put_again(mixture, n)] for layer in self._layers]

        def read(layer: Sequence[str]) -> list[list[Part]]:
            return [self.parts(name, mixture) for name in layer]

        if any(waiting):
            for layer, parts in read_ahead(waiting, read, side_streams(self.devices)):
                for name, of_weight in zip(layer, parts, strict=True):
                    self._put_parts(mixture, name, of_weight)

    def restore(self) -> None:
        """Put the dense expert back. An interrupted call may be repeated."""
        if self._pool is not None:
            self._pool.stop()
        if self._displaced:
            if self._fingerprint != fingerprint(self.model):
                self._moved = True  # someone has moved or cast the model inside the mixture
                self._locate()
            self._each(self._restore_weight, list(self._displaced))
        self._moved = False

    def _takes_part(self, weight: str, mixture: Mixture) -> list[str]:
        return [
            name
            for name, shares in self._changes.get(weight, ())
            if name in mixture or (shares and not mixture.is_dense)
        ]

    def _put_weight(self, mixture: Mixture, name: str) -> None:
        if not self._put_again(mixture, name):
            self._put_parts(mixture, name, self.parts(name, mixture))

    def _put_again(self, mixture: Mixture, name: str) -> bool:
        """Put a mixture in place by the step that was prepared when it was in place before; tell whether there is one."""
        ready = self.memory.ready.get((mixture.alone or "", name))
        if ready is None:
            return False
        self._displaced[name], step = ready
        step(self._weights[name])
        return True

    def _put_parts(self, mixture: Mixture, name: str, parts: list[Part]) -> None:
        if not parts:
            return
        weight, terms = self._weights[name], [(c, stored) for _, c, stored in parts]
        if any(stored.factors for _, stored in terms):
            saved = self.memory.whole.get(name, weight, lambda: displace(weight, terms))
        else:
            saved = [
                one
                for expert, _, stored in parts
                for one in self.memory.displaced.get(
                    (expert, name), stored, partial(displace, weight, [(1.0, stored)])
                )
            ]
        self._displaced[name] = saved
        mix_(weight, terms, saved)
        if mixture.alone is not None and not self.memory.bounded:
            step: Step | None = Overwriting.of(weight, terms)
            if step is None and weight.is_cuda:
                step = Adding.of(weight, terms, saved)
            if step is not None:
                self.memory.ready[mixture.alone, name] = saved, step

    def _restore_weight(self, name: str) -> None:
        if self._moved:
            self._weights[name].copy_(self.experts.dense(name))
        else:
            restore_(self._weights[name], self._displaced[name])
        del self._displaced[name]

    @property
    def _on_cpu(self) -> bool:
        return all(weight.device.type == "cpu" for weight in self._weights.values())

    def _each(self, function: Callable[[str], None], names: Iterable[str]) -> None:
        """Call a function with each name, on all cores from `parallel_from` parameters on."""
        ordered, threads = list(names), torch.get_num_threads()
        numel = sum(self._weights[name].numel() for name in ordered)
        if threads > 1 and numel >= self.parallel_from and self._on_cpu:
            # `restore` finds the pool here if an interrupt falls while the threads start.
            self._pool = Pool(function, ordered, threads)
            self._pool.run()
        else:
            for name in ordered:
                function(name)

    def _locate(self) -> None:
        self._weights = locate_weights(self.model, self._shapes, self._shapes)
        layers = self._all_layers or [[name] for name in self._shapes]
        self._layers = [[name for name in layer if name in self._shapes] for layer in layers]
        self.memory = Memory(bounded=self.experts.is_bounded)
        self._fingerprint = fingerprint(self.model)
