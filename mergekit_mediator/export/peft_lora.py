"""Experts as LoRA adapters: thin factors of every changed matrix, and the names of all other changed weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mergekit_mediator.delta.factors import squared_norm
from mergekit_mediator.errors import ExportError
from mergekit_mediator.export.adapter import Adapter, Factors
from mergekit_mediator.export.auto_rank import least_rank, rank_above_noise
from mergekit_mediator.export.experts import StoredExperts
from mergekit_mediator.export.low_rank import low_rank
from mergekit_mediator.export.noise import directions_above_noise
from mergekit_mediator.models.modules import Kind, is_tied, weight_kinds


@dataclass(frozen=True)
class Holdable:
    """The modules that an adapter can change.

    Attributes:
        kinds: the kind of each module, by the weight's name.
        users: the names of the modules that use a weight, by the weight's name; a tied weight has two.
    """

    kinds: Mapping[str, Kind]
    users: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, root: Path, embeddings: bool = True) -> "Holdable":
        """Find the modules of a checkpoint.

        Args:
            root: the checkpoint's directory.
            embeddings: whether the engine takes adapters that change the embedding and the head.
        """
        kinds = weight_kinds(root)
        if not embeddings:
            kinds = {
                name: kind
                for name, kind in kinds.items()
                if kind != "embedding" and name != "lm_head.weight"
            }
        modules = {name: name.removesuffix(".weight") for name in kinds}
        users: dict[str, tuple[str, ...]] = {name: (module,) for name, module in modules.items()}
        tables = [name for name, kind in kinds.items() if kind == "embedding"]
        if tables and "lm_head.weight" in kinds and is_tied(root):
            users[tables[0]] = (modules[tables[0]], "lm_head")
        return cls(kinds, users)

    def kind(self, weight: str, axes: int) -> Kind:
        """Return the kind of module that holds a weight; `other` if an adapter cannot change it.

        Args:
            weight: the weight's name.
            axes: the number of the weight's axes; an adapter changes matrices alone.
        """
        return self.kinds.get(weight, "other") if axes == 2 else "other"

    def unheld(self, experts: StoredExperts) -> tuple[str, ...]:
        """Return the names of the weights that experts change and adapters cannot hold: norms, biases and others."""
        weights = {weight: experts.dense.weight(weight).dim() for weight in experts.weights}
        return tuple(w for w, axes in weights.items() if self.kind(w, axes) == "other")


def to_adapter(
    experts: StoredExperts,
    mixture: Mapping[str, float],
    rank: int,
    holdable: Holdable,
    energy: float = 1.0,
    keep: float | None = None,
    measure: Callable[[Adapter], float] | None = None,
) -> Adapter:
    """Make the adapter that is nearest to a mixture.

    Args:
        experts: the artifact's experts.
        mixture: a weight above 0 by expert.
        rank: the largest rank of a module.
        holdable: the modules that an adapter can change.
        energy: the part in (0, 1] of each module's squared change that is enough; the rank of a module is the
            least that keeps it.
        keep: the part of the gain to keep; the rank is the least that is enough, see `least_rank`.
        measure: measures the part of the gain that an adapter keeps; without it, it is predicted, and random signs get
            the rank of `rank_above_noise`.

    Raises:
        ExportError: an expert is unknown, or the rank is below 1, or the energy is not in (0, 1].
    """
    if rank < 1:
        raise ExportError(f"rank: at least 1 is required, got {rank}")
    if not 0 < energy <= 1:
        raise ExportError(f"energy: above 0 and at most 1 is required, got {energy}")
    modules: dict[str, Factors] = {}
    dropped, lost, base_square = [], 0.0, 0.0
    directions: list[int] = []
    for change in experts.changes(mixture):
        kind = holdable.kind(change.weight, len(change.shape))
        dense = experts.dense.weight(change.weight)
        if kind == "other":
            dropped.append(change.weight)
            lost += float(change.tensor(dense).double().square().sum())
            continue
        square = squared_norm(dense)
        factors = low_rank(change, dense, rank, energy)
        if change.is_noisy and keep is not None and measure is None:
            directions.append(directions_above_noise(change, factors))
        for module in holdable.users[change.weight]:
            module_kind: Kind = "linear" if module == "lm_head" else kind
            modules[module] = Factors(module_kind, factors)
            base_square += square
    adapter = Adapter(modules, tuple(dropped), lost, base_square=base_square)
    if keep is None:
        return adapter
    return (
        rank_above_noise(adapter, keep, max(directions))
        if directions
        else least_rank(adapter, keep, measure)
    )
