"""Experts as LoRA adapters: every changed matrix as thin factors, all else named and counted."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mergekit_mediator.errors import ExportError
from mergekit_mediator.export.adapter import Adapter, Factors
from mergekit_mediator.export.experts import StoredExperts
from mergekit_mediator.export.low_rank import low_rank
from mergekit_mediator.models.modules import Kind, is_tied, weight_kinds


@dataclass(frozen=True)
class Holdable:
    """The modules that an adapter can change.

    Attributes:
        kinds: by the weight's name.
        users: by the weight's name, the modules that use it; a tied weight has two.
    """

    kinds: Mapping[str, Kind]
    users: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, root: Path) -> "Holdable":
        """Those of a checkpoint."""
        kinds = weight_kinds(root)
        modules = {name: name.removesuffix(".weight") for name in kinds}
        users: dict[str, tuple[str, ...]] = {name: (module,) for name, module in modules.items()}
        embeddings = [n for n, kind in kinds.items() if kind == "embedding"]
        if embeddings and "lm_head.weight" in kinds and is_tied(root):
            users[embeddings[0]] = (modules[embeddings[0]], "lm_head")
        return cls(kinds, users)


def to_adapter(
    experts: StoredExperts, mixture: Mapping[str, float], rank: int, holdable: Holdable
) -> Adapter:
    """The adapter that is nearest to a mixture.

    Args:
        experts: of an artifact.
        mixture: weights by expert.
        rank: the largest of any module.
        holdable: the modules that an adapter can change.

    Raises:
        ExportError: an unknown expert, or a rank that is not positive.
    """
    if rank < 1:
        raise ExportError(f"rank: at least 1 required, got {rank}")
    modules: dict[str, Factors] = {}
    dropped, energy = [], 0.0
    for change in experts.changes(mixture):
        kind = holdable.kinds.get(change.weight, "other")
        dense = experts.dense.weight(change.weight)
        if kind == "other" or len(change.shape) != 2:
            dropped.append(change.weight)
            energy += float(change.tensor(dense).double().square().sum())
            continue
        factors = low_rank(change, dense, rank)
        for module in holdable.users[change.weight]:
            own: Kind = "linear" if module == "lm_head" else kind
            modules[module] = Factors(own, factors)
    return Adapter(modules, tuple(dropped), energy)
