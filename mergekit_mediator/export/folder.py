"""A folder of adapters, one for each expert, with cards and, if wanted, a dense checkpoint made for them."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mergekit_mediator.export.adapter import Adapter, write_peft
from mergekit_mediator.export.adapter_card import adapter_card
from mergekit_mediator.export.answers import AnswerProbe
from mergekit_mediator.export.baked import BAKED, check_baked, write_baked
from mergekit_mediator.export.card import write_card
from mergekit_mediator.export.experts import StoredExperts
from mergekit_mediator.export.figures import ExportedExpert, refuse_dropped
from mergekit_mediator.export.new_folder import new_folder
from mergekit_mediator.export.peft_lora import Holdable, to_adapter
from mergekit_mediator.export.peft_shira import SparseAdapter, to_sparse, write_shira
from mergekit_mediator.models.prompts import Prompt


def export_adapters(
    experts: StoredExperts,
    out: Path,
    rank: int,
    names: Sequence[str] | None = None,
    one_rank: bool = False,
    *,
    energy: float = 1.0,
    keep: float | None = None,
    embeddings: bool = True,
    drop: bool = False,
    bake_mean: bool = False,
    prompts: Sequence[Prompt] = (),
) -> list[ExportedExpert]:
    """Write a LoRA adapter for each expert to a new folder, which appears when all adapters are written.

    Args:
        experts: the experts of an artifact whose files are verified.
        out: the folder; it must be absent or empty.
        rank: the largest rank of a module.
        names: the experts to export; None for all.
        one_rank: give every module of an adapter the same rank.
        energy: the part in (0, 1] of each module's squared change that is enough, see `to_adapter`.
        keep: the part of its expert's gain that each adapter keeps; its rank is the least of a few that is enough,
            by what the prompts measure, or else by prediction, see `least_rank`.
        embeddings: let adapters change the embedding and the head.
        drop: leave out what an adapter cannot hold, such as norms and biases.
        bake_mean: leave that out, too, and write the checkpoint that the adapters are added to, `dense`: the dense
            expert, with the mean of the exported experts in these weights.
        prompts: compare the answers of each expert and its adapter on these.

    Returns:
        The figures of each adapter.

    Raises:
        ExportError: the folder is not empty or cannot be written, an expert is unknown or changes no module,
            the rank is below 1, an expert changes what an adapter cannot hold and neither `drop` nor `bake_mean`
            is given, or the mean is to be baked and the experts are relative to the base or one is called `dense`.
    """
    holdable, chosen = Holdable.of(experts.root, embeddings), experts.chosen(names)
    if bake_mean:
        check_baked(experts, chosen)
    base = experts.manifest.base.source if experts.reference == "base" else str(experts.root)
    dtype = experts.dense.weight(experts.weights[0]).dtype
    probe = AnswerProbe(experts, prompts) if prompts else None
    exported, distances = [], {}
    with new_folder(out) as folder:
        if bake_mean:
            base = str(out / BAKED)
            distances = write_baked(experts, chosen, holdable.unheld(experts), folder)
        for name in chosen:
            measure = partial(probe.kept, name) if probe else None
            adapter = to_adapter(experts, {name: 1.0}, rank, holdable, energy, keep, measure)
            if not (drop or bake_mean):
                refuse_dropped(name, adapter)
            written = adapter.of_one_rank() if one_rank else adapter
            write_peft(written, folder / name, base, dtype)
            lacking = distances.get(name, adapter.dropped_energy)
            exported.append(_with_card(folder / name, adapter, lacking, "LoRA", base, probe))
        write_card(folder, experts, exported, bake_mean)
    return exported


def export_shira(
    experts: StoredExperts,
    out: Path,
    names: Sequence[str] | None = None,
    *,
    drop: bool = False,
    prompts: Sequence[Prompt] = (),
) -> list[ExportedExpert]:
    """Write a SHiRA adapter for each expert to a new folder, which appears when all adapters are written.

    Args:
        experts: the experts of an artifact whose files are verified, relative to its dense expert.
        out: the folder; it must be absent or empty.
        names: the experts to export; None for all.
        drop: leave out what is no matrix of a linear layer.
        prompts: compare the answers of each expert and its adapter on these.

    Returns:
        The figures of each adapter.

    Raises:
        ExportError: see `to_sparse`; the folder is not empty or cannot be written; or an expert changes more than
            linear layers and `drop` is not given.
    """
    holdable, base = Holdable.of(experts.root), str(experts.root)
    probe = AnswerProbe(experts, prompts) if prompts else None
    exported = []
    with new_folder(out) as folder:
        for name in experts.chosen(names):
            adapter = to_sparse(experts, name, holdable)
            if not drop:
                refuse_dropped(name, adapter)
            write_shira(adapter, folder / name, base)
            lacking = adapter.dropped_energy
            exported.append(_with_card(folder / name, adapter, lacking, "SHiRA", base, probe))
        write_card(folder, experts, exported, bakes_mean=False)
    return exported


def _with_card(
    folder: Path,
    adapter: Adapter | SparseAdapter,
    lacking: float,
    form: str,
    base: str,
    probe: AnswerProbe | None,
) -> ExportedExpert:
    """Write the card of an adapter that is in its folder; return the adapter's figures."""
    answers = probe.error(folder.name, adapter) if probe else None
    figures = ExportedExpert.of(folder.name, adapter, lacking, folder, answers)
    card = adapter_card(figures, form, base)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return figures
