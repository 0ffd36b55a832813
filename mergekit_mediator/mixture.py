"""Mixtures of experts on the weights of one model: entered in place, left bit for bit."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import RLock

from torch import Tensor

from mergekit_mediator.errors import MixtureError
from mergekit_mediator.expert_file import ExpertFile
from mergekit_mediator.sparse import Displaced, SparseTensor, mix_, restore_


class Mixer:
    """Puts mixtures of experts into the routed weights of one model, one mixture at a time."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        experts: Mapping[str, ExpertFile],
        dense: Callable[[str], Tensor],
    ) -> None:
        """
        Args:
            weights: the routed weights in the model, by name, holding the dense expert.
            experts: the stored experts by name; each is read when it is first used.
            dense: gives a dense weight as it is in the checkpoint.
        """
        self._weights, self._files, self._dense = weights, experts, dense
        self._resident: dict[str, dict[str, SparseTensor]] = {}
        self._active: dict[str, float] | None = None
        self._lock = RLock()

    @property
    def active(self) -> dict[str, float]:
        """The weights of the experts in the mixture that is in place; empty for the dense expert."""
        return dict(self._active or {})

    @contextmanager
    def mixture(self, mixture: Mapping[str, float]) -> Iterator[None]:
        """W(p) = W_dense + Σ_t p_t Δ_t inside the context, the dense expert's bits after it.

        Other threads wait until the context is left.

        Args:
            mixture: weights by expert; an empty one is the dense expert.

        Raises:
            MixtureError: an unknown expert, a weight that is negative or not finite, weights that
                are all zero, or a mixture inside another one.
        """
        chosen = self.check(mixture)
        with self._lock:
            if self._active is not None:
                raise MixtureError(
                    f"a mixture of {', '.join(self._active) or 'no expert'} is in place already: "
                    "leave it before entering another"
                )
            self._active = chosen
            displaced: dict[str, Sequence[Displaced]] = {}
            try:
                self._enter(chosen, displaced)
                yield
            finally:
                for name, saved in displaced.items():
                    restore_(self._weights[name], saved)
                self._active = None

    def check(self, mixture: Mapping[str, float]) -> dict[str, float]:
        """The experts of a mixture that have a weight above 0, as plain numbers.

        Raises:
            MixtureError: see `mixture`.
        """
        for name, weight in mixture.items():
            if name not in self._files:
                known = ", ".join(self._files)
                raise MixtureError(f"unknown expert {name!r}; this model has {known}")
            if not math.isfinite(weight) or weight < 0:
                raise MixtureError(
                    f"expert {name!r}: weight must be finite and at least 0, got {weight}"
                )
        chosen = {name: float(weight) for name, weight in mixture.items() if weight > 0}
        if mixture and not chosen:
            raise MixtureError("a mixture needs one weight above 0; for the dense expert give none")
        return chosen

    def expert(self, name: str) -> dict[str, SparseTensor]:
        """What one expert keeps of each routed weight, in memory from the first use on."""
        if name not in self._resident:
            file = self._files[name]
            self._resident[name] = {
                weight: file.read(weight, self._dense(weight)).to(self._weights[weight].device)
                for weight in file.weights
            }
        return self._resident[name]

    def _enter(
        self, mixture: Mapping[str, float], displaced: dict[str, Sequence[Displaced]]
    ) -> None:
        stored = {name: self.expert(name) for name in mixture}
        for name, weight in self._weights.items():
            parts = [(p, stored[e][name]) for e, p in mixture.items() if name in stored[e]]
            if parts:
                displaced[name] = mix_(weight, parts)
