"""A folder of adapters, one for each expert, with a card and, if wanted, a dense checkpoint made for them."""

from collections.abc import Sequence
from pathlib import Path

from mergekit_mediator.errors import ExportError
from mergekit_mediator.export.adapter import write_peft
from mergekit_mediator.export.baked import BAKED, write_baked
from mergekit_mediator.export.card import write_card
from mergekit_mediator.export.experts import StoredExperts
from mergekit_mediator.export.figures import ExportedExpert
from mergekit_mediator.export.new_folder import new_folder
from mergekit_mediator.export.peft_lora import Holdable, to_adapter


def export_adapters(
    experts: StoredExperts,
    out: Path,
    rank: int,
    names: Sequence[str] | None = None,
    one_rank: bool = False,
    bake_mean: bool = False,
    embeddings: bool = True,
) -> list[ExportedExpert]:
    """Write an adapter for each expert to a new folder, which appears when all adapters are written.

    Args:
        experts: the experts of an artifact whose files are verified.
        out: the folder; it must be absent or empty.
        rank: the largest rank of a module.
        names: the experts to export; None for all.
        one_rank: give every module of an adapter the same rank.
        bake_mean: write also the checkpoint that the adapters are added to, `dense`: the dense expert, with the
            mean of the exported experts in the weights that adapters cannot hold.
        embeddings: let adapters change the embedding and the head.

    Returns:
        The figures of each adapter.

    Raises:
        ExportError: the folder is not empty or cannot be written, an expert is unknown or changes no module,
            the rank is below 1, or the mean is to be baked and the experts are relative to the base or one is
            called `dense`.
    """
    if bake_mean and experts.reference != "dense":
        raise ExportError(
            "--bake-mean changes the dense expert: adapters relative to dense are required, got relative to "
            f"{experts.reference}: leave one of the two options out"
        )
    holdable = Holdable.of(experts.root, embeddings)
    chosen = tuple(experts.names if names is None else dict.fromkeys(names))
    model = experts.manifest.base.source if experts.reference == "base" else str(experts.root)
    dtype = experts.dense.weight(experts.weights[0]).dtype
    exported, distances = [], {}
    with new_folder(out) as folder:
        if bake_mean:
            experts.check_names(chosen)
            model = str(out / BAKED)
            distances = write_baked(experts, chosen, holdable.unheld(experts), folder)
        for name in chosen:
            adapter = to_adapter(experts, {name: 1.0}, rank, holdable)
            written = adapter.of_one_rank() if one_rank else adapter
            write_peft(written, folder / name, model, dtype)
            lacking = distances.get(name, adapter.dropped_energy)
            exported.append(ExportedExpert.of(name, adapter, lacking, folder / name))
        write_card(folder, experts, exported, bake_mean)
    return exported
