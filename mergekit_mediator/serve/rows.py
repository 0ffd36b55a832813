"""The rows form: every row of a batch with a mixture of its own, without touching the weights.

In a routed layer `y_b = x_b W' + Σ_t c_bt (x_b D_t')`, where D_t is what expert t adds to the dense
weight W and c_bt its coefficient in the row's mixture (see `StoredWeight.coefficient`).
Each expert is applied once per layer, to its rows together; low-rank parts of all experts are one pair
of thin products. Costs grow with the experts in use, and there is nothing to enter or leave.
"""

from collections.abc import Generator
from functools import partial

import torch
from torch import Tensor, nn

from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.errors import MixtureError
from mergekit_mediator.models.hooks import hooked
from mergekit_mediator.models.scope import scope
from mergekit_mediator.serve.mixer import Mixer
from mergekit_mediator.serve.mixture import Mixture
from mergekit_mediator.serve.row_modules import Kind, Part, Place, kind_of, sparse_matrix

# Putting factors into weights, and the dense weights back, takes as long as the thin products of as many
# tokens as count the same multiplications, times this; and a decoding step takes as long as this many
# tokens together, since it waits for memory and not for arithmetic (benchmarks/runtime.py).
_ENTERING = 2
_STEP = 48

_Plan = dict[str, list[tuple[Place, Kind]]]
_Obstacle = str | None


class Rows:
    """Applies one mixture per row to the modules of a model, by hooks."""

    def __init__(self, model: nn.Module, mixer: Mixer) -> None:
        self._model, self._mixer = model, mixer
        self._planned: tuple[dict[str, Tensor], _Plan, _Obstacle] | None = None

    def obstacle(self) -> str | None:
        """The first routed weight that this form cannot serve, with its module's class; None if none."""
        return self._plan()[1]

    @scope
    def applied(self, rows: tuple[Mixture, ...]) -> Generator[None, None, None]:
        """Inside, row b of every batch has mixture b; of larger batches, rows follow each other in
        groups of equal size, as beams and returned sequences do. One mixture alone is for every row.

        Raises:
            MixtureError: a routed weight that this form cannot serve.
        """
        plan, obstacle = self._plan()
        if obstacle is not None:
            raise MixtureError(
                f"apply='rows' cannot serve {obstacle}: use apply='merge', which runs the rows of "
                "each mixture together"
            )
        with self._mixer.hold(rows):
            weights, hooks = self._mixer.placer.weights, []
            for name, places in plan.items():
                parts = self._parts(name, weights[name], rows)
                if parts:
                    hooks += [
                        kind(place, weights[name], parts, len(rows)) for place, kind in places
                    ]
            with hooked(hooks):
                yield

    def is_cheaper(self, mixture: Mixture, batch: int, length: int, steps: int) -> bool:
        """Whether a batch of one mixture takes less time in this form than with the mixture in place.

        It does where experts are factors alone, for as long as few tokens are computed: a product
        with r factors takes r (in + out) multiplications a token, and putting them in place r in out.

        Args:
            mixture: of every row.
            batch: rows.
            length: tokens of the longest prompt.
            steps: tokens to be generated for each row, at most; 0 for a forward pass.
        """
        if self.obstacle() is not None:
            return False
        self._mixer.open((mixture,))
        thin = whole = 0
        for name, weight in self._mixer.placer.weights.items():
            for stored in self._mixer.placer.described(name, mixture):
                if stored.count or not stored.factors:
                    return False
                thin += stored.factor_numbers
                whole += stored.factors.rank * weight.numel()
        tokens = batch * length + steps * max(batch, _STEP)
        return tokens * thin < _ENTERING * whole

    def _plan(self) -> tuple[_Plan, _Obstacle]:
        """How each module that uses a routed weight is served, and what cannot be."""
        weights = self._mixer.placer.weights
        if self._planned is None or self._planned[0] is not weights:  # moved or cast since
            self._planned = (weights, *_plan(self._model, weights))
        return self._planned[1:]

    def _parts(self, name: str, weight: Tensor, rows: tuple[Mixture, ...]) -> list[Part]:
        """The experts that change a weight, each with its coefficients for the rows."""
        found: dict[str, tuple[StoredWeight, list[float]]] = {}
        for mixture in set(rows):
            for expert, coefficient, stored in self._mixer.placer.parts(name, mixture):
                _, coefficients = found.setdefault(expert, (stored, [0.0] * len(rows)))
                for row, own in enumerate(rows):
                    if own == mixture:
                        coefficients[row] = coefficient
        return [
            Part(
                stored,
                torch.tensor(coefficients, device=weight.device),
                partial(self._matrix, expert, name, weight, stored),
            )
            for expert, (stored, coefficients) in found.items()
            if stored.positions.numel() or stored.factors
        ]

    def _matrix(self, expert: str, name: str, weight: Tensor, stored: StoredWeight) -> Tensor:
        matrices = self._mixer.placer.memory.matrices
        return matrices.get((expert, name), stored, lambda: sparse_matrix(weight, stored))


def _plan(model: nn.Module, weights: dict[str, Tensor]) -> tuple[_Plan, _Obstacle]:
    plan: _Plan = {}
    for name, places in _places(model, weights).items():
        if not places:
            return plan, f"{name}, which is part of a larger weight"
        plan[name] = []
        for place in places:
            kind = kind_of(place)
            if kind is None:
                return plan, f"{name} in {type(place.module).__name__}"
            plan[name].append((place, kind))
    return plan, None


def _places(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, list[Place]]:
    """The modules that use each routed weight; a tied weight has several."""
    users: dict[tuple[int, torch.Size], list[Place]] = {}
    for module in model.modules():
        for parameter, value in module.named_parameters(recurse=False, remove_duplicate=False):
            key = (value.data_ptr(), value.shape)
            users.setdefault(key, []).append(Place(module, parameter))
    return {name: users.get((w.data_ptr(), w.shape), []) for name, w in weights.items()}
