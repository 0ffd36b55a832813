"""A folder of GGUF files: one whole model, or the adapters of the experts with the model that they are added to."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from mergekit_mediator.errors import ExportError
from mergekit_mediator.export.answers import AnswerProbe
from mergekit_mediator.export.baked import BAKED, check_baked, distances_from_mean, mean_of
from mergekit_mediator.export.card import write_card
from mergekit_mediator.export.experts import StoredExperts
from mergekit_mediator.export.figures import ExportedExpert, refuse_dropped
from mergekit_mediator.export.gguf.layout import Layout, NotInGgufError
from mergekit_mediator.export.gguf.lora import (
    as_gguf_adapter,
    holdable_in_gguf,
    write_gguf_lora,
)
from mergekit_mediator.export.gguf.model import GgufModel
from mergekit_mediator.export.new_folder import new_folder
from mergekit_mediator.export.peft_lora import to_adapter
from mergekit_mediator.models.prompts import Prompt

# The name of the dense expert's file.
DENSE_FILE = f"{BAKED}.gguf"


def is_written(root: Path) -> bool:
    """Tell whether this package writes a checkpoint as GGUF.

    Args:
        root: the checkpoint's directory.

    Raises:
        ExportError: the checkpoint cannot be read, or the package `gguf` is not installed.
    """
    try:
        GgufModel(root)
    except NotInGgufError:
        return False
    return True


def export_gguf_model(
    experts: StoredExperts, mixture: Mapping[str, float] | None, out: Path
) -> Path:
    """Write the model that a mixture makes as one GGUF file, bit for bit as it is served.

    Args:
        experts: the experts of an artifact whose files are verified, relative to its dense expert.
        mixture: the weights by expert, above 0; None for the dense expert.
        out: a folder that is absent or empty; it appears when the file is whole.

    Returns:
        The file.

    Raises:
        NotInGgufError: see `GgufModel`.
        ExportError: an expert is unknown, the experts are relative to the base, or the folder is not empty or
            cannot be written.
    """
    if experts.reference != "dense":
        raise ExportError("a whole model is made of the dense expert: relative to dense required")
    experts.check_names(mixture or ())
    model = GgufModel(experts.root)
    name = _name_of(mixture)
    with new_folder(out) as folder:
        _write_model(model, experts, mixture or {}, experts.weights, folder / name)
    return out / name


def export_gguf_adapters(
    experts: StoredExperts,
    out: Path,
    rank: int,
    names: Sequence[str] | None = None,
    *,
    energy: float = 1.0,
    keep: float | None = None,
    embeddings: bool = True,
    drop: bool = False,
    with_model: bool = False,
    bake_mean: bool = False,
    prompts: Sequence[Prompt] = (),
) -> list[ExportedExpert]:
    """Write an adapter for each expert, `NAME.gguf`, to a new folder, which appears when all are written.

    Args:
        experts: the experts of an artifact whose files are verified.
        out: the folder; it must be absent or empty.
        rank: the largest rank of a module; every module gets the largest rank that one of them has.
        names: the experts to export; None for all.
        energy: the part in (0, 1] of each module's squared change that is enough, see `to_adapter`.
        keep: the part of its expert's gain that each adapter keeps, see `export_adapters`.
        embeddings: let adapters change the embedding and the head.
        drop: leave out what an adapter cannot hold, such as norms, biases and a tied embedding.
        with_model: write also the dense expert, `dense.gguf`.
        bake_mean: leave out what an adapter cannot hold; the written model has the mean of the exported experts there.
        prompts: compare the answers of each expert and its adapter on these.

    Returns:
        The figures of each adapter.

    Raises:
        NotInGgufError: the architecture, or the model that is to be written, is none that this package writes.
        ExportError: see `export_adapters`; or an expert is called `dense` and the model is to be written.
    """
    layout, chosen = Layout.of(experts.root), experts.chosen(names)
    if bake_mean:
        check_baked(experts, chosen)
    model = GgufModel(experts.root) if with_model else None
    if model and BAKED in chosen:
        raise ExportError(
            f"expert {BAKED!r}: the file of this name is for the dense expert: run `mergekit-mediator rename-expert`"
        )
    holdable = holdable_in_gguf(experts.root, embeddings)
    dtype = experts.dense.weight(experts.weights[0]).dtype
    probe = AnswerProbe(experts, prompts) if prompts else None
    unheld = holdable.unheld(experts) if bake_mean else ()
    distances = distances_from_mean(experts, chosen, unheld) if bake_mean else {}
    exported = []
    with new_folder(out) as folder:
        for name in chosen:
            measure = partial(probe.kept, name) if probe else None
            nearest = to_adapter(experts, {name: 1.0}, rank, holdable, energy, keep, measure)
            adapter = as_gguf_adapter(nearest)
            if not (drop or bake_mean):
                refuse_dropped(name, adapter)
            path = folder / f"{name}.gguf"
            write_gguf_lora(adapter, path, layout, dtype, name)
            lacking = distances.get(name, adapter.dropped_energy)
            answers = probe.error(name, adapter) if probe else None
            exported.append(ExportedExpert.of(name, adapter, lacking, path, answers))
        if model:
            mean = mean_of(chosen) if bake_mean else {}
            _write_model(model, experts, mean, unheld, folder / DENSE_FILE)
        kind = f"GGUF file but `{DENSE_FILE}`" if model else "GGUF file"
        write_card(folder, experts, exported, bake_mean, DENSE_FILE, kind)
    return exported


def _write_model(
    model: GgufModel,
    experts: StoredExperts,
    mixture: Mapping[str, float],
    changed: Collection[str],
    path: Path,
) -> None:
    """Write the model of a mixture, which changes the weights of these names alone."""

    def weight(name: str) -> Tensor:
        return experts.mixed(name, mixture) if name in changed else experts.dense.weight(name)

    model.write(path, weight, f"{experts.root.resolve().name} {path.stem}")


def _name_of(mixture: Mapping[str, float] | None) -> str:
    """Return the file name of a mixture, such as `dense.gguf`, `math.gguf` or `math=0.25+chat=0.75.gguf`."""
    if not mixture:
        return DENSE_FILE
    if list(mixture.values()) == [1.0]:
        return f"{next(iter(mixture))}.gguf"
    return "+".join(f"{name}={weight:g}" for name, weight in mixture.items()) + ".gguf"
