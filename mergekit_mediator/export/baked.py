"""The dense checkpoint with the mean of the experts in the weights that adapters cannot hold.

An engine adds one expert's adapter to the dense checkpoint. A norm of the checkpoint answers for every expert, and
of all values the mean of the experts' has the least summed squared distance from them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mergekit_mediator.errors import ExportError
from mergekit_mediator.export.checkpoint import export_checkpoint
from mergekit_mediator.export.experts import StoredExperts

# The folder of the checkpoint, beside those of the adapters.
BAKED = "dense"


def check_baked(experts: StoredExperts, names: Sequence[str]) -> None:
    """Refuse experts whose mean cannot be baked.

    Args:
        experts: the artifact's experts.
        names: the experts whose mean is taken.

    Raises:
        ExportError: the experts are relative to the base, or one is called `dense`.
    """
    if experts.reference != "dense":
        raise ExportError(
            "--bake-mean changes the dense expert: adapters relative to dense are required, got relative to "
            f"{experts.reference}: leave one of the two options out"
        )
    if BAKED in names:
        raise ExportError(
            f"expert {BAKED!r}: the folder of this name is for the dense checkpoint: merge again with another "
            "name for this expert, or export without --bake-mean"
        )


def mean_of(names: Sequence[str]) -> dict[str, float]:
    """Return the mixture in which all experts have the same weight."""
    return {name: 1 / len(names) for name in names}


def write_baked(
    experts: StoredExperts, names: Sequence[str], weights: Sequence[str], folder: Path
) -> dict[str, float]:
    """Write the dense checkpoint with the mean of experts in some weights, to `folder/dense`.

    Args:
        experts: the artifact's experts, relative to its dense expert.
        names: the experts whose mean is taken; an expert that does not change a weight counts with the dense
            expert's.
        weights: the names of the weights that become the mean.
        folder: the folder of the adapters.

    Returns:
        By expert, the squared distance of its weights from their mean.
    """
    export_checkpoint(experts, mean_of(names), folder / BAKED, weights)
    return distances_from_mean(experts, names, weights)


def distances_from_mean(
    experts: StoredExperts, names: Sequence[str], weights: Sequence[str]
) -> dict[str, float]:
    """Compute by expert the squared distance of its weights from the mean of all; see `write_baked`."""
    mean = mean_of(names)
    return {name: _distance(experts, name, mean, weights) for name in names}


def _distance(
    experts: StoredExperts, name: str, mean: Mapping[str, float], weights: Sequence[str]
) -> float:
    """Compute the squared distance of an expert's weights from the mean's."""
    total = 0.0
    for weight in weights:
        dense = experts.dense.weight(weight)
        own = experts.change(weight, {name: 1.0}).tensor(dense)
        total += float((own - experts.change(weight, mean).tensor(dense)).double().square().sum())
    return total
