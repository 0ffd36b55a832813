"""The card of a folder of adapters: what each adapter leaves out, and which model the adapters belong to."""

from collections.abc import Sequence
from pathlib import Path

from mergekit_mediator.export.baked import BAKED
from mergekit_mediator.export.experts import StoredExperts
from mergekit_mediator.export.figures import (
    COLUMNS,
    ExportedExpert,
    counted,
    left_out,
    said_of_ranks,
)
from mergekit_mediator.store.manifest import CARD

_CARD = """# Adapters of {name}

Exported by mergekit-mediator. Each {kind} is an adapter of one expert, to be added to {model}.

{table}

{ranks}{weights}
"""


def write_card(
    folder: Path,
    experts: StoredExperts,
    exported: Sequence[ExportedExpert],
    bakes_mean: bool,
    baked: str = BAKED,
    kind: str = "folder",
) -> None:
    """Write `README.md` without naming a directory of this machine.

    Args:
        folder: the folder of the adapters.
        experts: the artifact's experts.
        exported: the figures of the adapters.
        bakes_mean: whether the folder holds the dense checkpoint with the mean of the experts.
        baked: the name of that checkpoint.
        kind: the form of an adapter, a `folder` or a file.
    """
    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *(expert.cells() for expert in exported)]
    name = experts.root.resolve().name
    model = f"the checkpoint in `{baked}`" if bakes_mean else f"the dense expert of `{name}`"
    if experts.reference == "base":
        model = f"the base model, `{Path(experts.manifest.base.source).name}`"
    ranks = said_of_ranks(exported)
    text = _CARD.format(
        name=f"`{name}`",
        kind=kind,
        model=model,
        table="\n".join(f"| {' | '.join(row)} |" for row in rows),
        ranks=f"{ranks}\n\n" if ranks else "",
        weights=said_of_weights(exported, bakes_mean),
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def said_of_weights(exported: Sequence[ExportedExpert], bakes_mean: bool) -> str:
    """Name and count the weights that the adapters leave out, and say whose values the served model has there."""
    weights = left_out(exported)
    if not weights:
        return "The adapters hold every changed weight."
    whose = "the mean of the experts'" if bakes_mean else "the dense model's"
    return (
        f"The adapters leave out {len(weights)} weights, and {whose} answer for every expert: "
        f"{', '.join(counted(weights))}."
    )
