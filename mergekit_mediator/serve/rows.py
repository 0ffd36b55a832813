"""The rows form: give every row of a batch its own mixture, without a change of the weights.

In a routed layer `y_b = x_b W' + Σ_t c_bt (x_b D_t')`, where D_t is the change that expert t makes to the
dense weight W, and c_bt is its coefficient in the row's mixture (see `StoredWeight.coefficient`). Each expert is
applied once per layer, to all its rows together. The low-rank parts of all experts are one pair of thin
products. The cost grows with the number of experts in use; entering and leaving cost nothing.
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
from mergekit_mediator.serve.row_modules import (
    Kind,
    Matrix,
    Part,
    Place,
    kind_of,
    sparse_matrix,
)

# A decoding step of one row takes as long as a forward pass of this many tokens, because the step waits for
# memory and not for arithmetic. `auto` with this number and `entering_cost` is compared with both forms
# in benchmarks/results/runtime.json ("one answer of ... tokens" in docs/results/serving-cost.md).
_STEP_TOKENS = 48

_Plan = dict[str, list[tuple[Place, Kind]]]
_Obstacle = str | None


class Rows:
    """Apply one mixture per row to the modules of a model, by hooks.

    Attributes:
        entering_cost: the time of one multiplication of entering and leaving a mixture of factors, over the
            time of one multiplication of their thin products with tokens.
    """

    def __init__(self, model: nn.Module, mixer: Mixer, entering_cost: float = 2) -> None:
        """Plan nothing yet.

        Args:
            model: the model.
            mixer: the mixer of the same model.
            entering_cost: see above.
        """
        self._model, self._mixer, self.entering_cost = model, mixer, entering_cost
        self._planned: tuple[dict[str, Tensor], _Plan, _Obstacle] | None = None

    def obstacle(self) -> str | None:
        """Name the first routed weight that this form cannot serve, and its module's class; None if none."""
        return self._plan()[1]

    @scope
    def applied(self, rows: tuple[Mixture, ...]) -> Generator[None, None, None]:
        """Apply mixture b to row b of every batch inside the context.

        One mixture alone applies to every row. In a larger batch, as beams and returned sequences make it,
        each row becomes a group of consecutive rows; all groups have the same size.

        Raises:
            MixtureError: this form cannot serve a routed weight.
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
        """Tell whether a batch of one mixture takes less time in this form than with the mixture in place.

        It does if experts are factors alone and few tokens are computed: factors of rank r take
        r (in + out) multiplications a token, and putting them in place takes r in out.

        Args:
            mixture: the mixture of every row.
            batch: the number of rows.
            length: the tokens of the longest prompt.
            steps: the most tokens to generate for each row; 0 for a forward pass.
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
        tokens = batch * length + steps * max(batch, _STEP_TOKENS)
        return tokens * thin < self.entering_cost * whole

    def _plan(self) -> tuple[_Plan, _Obstacle]:
        """Plan a hook for each module that uses a routed weight, up to the first obstacle."""
        weights = self._mixer.placer.weights
        if self._planned is None or self._planned[0] is not weights:  # the model was moved or cast
            self._planned = (weights, *_plan(self._model, weights))
        return self._planned[1:]

    def _parts(self, name: str, weight: Tensor, rows: tuple[Mixture, ...]) -> list[Part]:
        """List the experts that change a weight, each with its coefficients for the rows."""
        experts: dict[str, tuple[StoredWeight, list[float]]] = {}
        for mixture in set(rows):
            for expert, coefficient, stored in self._mixer.placer.parts(name, mixture):
                _, coefficients = experts.setdefault(expert, (stored, [0.0] * len(rows)))
                for place, row in enumerate(rows):
                    if row == mixture:
                        coefficients[place] = coefficient
        return [
            Part(
                stored,
                coefficients,
                torch.tensor(coefficients, device=weight.device),
                partial(self._matrix, expert, name, weight, stored),
            )
            for expert, (stored, coefficients) in experts.items()
            if stored.positions.numel() or stored.factors
        ]

    def _matrix(self, expert: str, name: str, weight: Tensor, stored: StoredWeight) -> Matrix:
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
    """List the modules that use each routed weight; a tied weight has several."""
    users: dict[tuple[int, torch.Size], list[Place]] = {}
    for module in model.modules():
        for parameter, value in module.named_parameters(recurse=False, remove_duplicate=False):
            key = (value.data_ptr(), value.shape)
            users.setdefault(key, []).append(Place(module, parameter))
    return {name: users.get((w.data_ptr(), w.shape), []) for name, w in weights.items()}
