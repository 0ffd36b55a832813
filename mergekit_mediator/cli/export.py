"""The command `export`: write an artifact's experts in forms that other tools load."""

import json
from pathlib import Path
from typing import Any

import click

from mergekit_mediator.cli import options, tables
from mergekit_mediator.export.baked import BAKED
from mergekit_mediator.export.card import said_of_weights
from mergekit_mediator.export.checkpoint import export_checkpoint
from mergekit_mediator.export.experts import Reference, StoredExperts
from mergekit_mediator.export.figures import COLUMNS
from mergekit_mediator.export.folder import export_adapters
from mergekit_mediator.export.start_commands import (
    llama_cpp_commands,
    sglang_command,
    vllm_command,
)
from mergekit_mediator.store.manifest import read_manifest, verify_files

_COMMANDS = {"vllm": vllm_command, "sglang": sglang_command, "llama.cpp": llama_cpp_commands}
_OF_ONE_RANK = {"sglang", "llama.cpp"}  # engines that need one rank for all modules of an adapter


@click.command()
@click.argument("out", type=options.directory)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "engine",
    type=click.Choice(["peft", "vllm", "sglang", "llama.cpp", "checkpoint"]),
    default="peft",
    show_default=True,
    help="The tool that loads the adapters; for an engine, its commands are printed too. `checkpoint` writes "
    "one plain model.",
)
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="The largest rank of an adapter; an expert of a smaller rank keeps its own rank.",
)
@click.option(
    "--relative-to",
    "reference",
    type=click.Choice(["dense", "base"]),
    default="dense",
    show_default=True,
    help="The model that the adapters are added to: OUT, or the base that it was merged from.",
)
@click.option(
    "--expert",
    "names",
    multiple=True,
    help="Export this expert only; may be repeated. A checkpoint blends NAME=WEIGHT.",
)
@click.option(
    "--bake-mean",
    is_flag=True,
    help="Write also the model to serve, FOLDER/dense: OUT, with the mean of the experts in the weights that "
    "adapters cannot hold.",
)
@click.option(
    "--no-embeddings",
    is_flag=True,
    help="Leave the embedding and the head out of the adapters, for models whose embedding an engine changes by no "
    "adapter, such as Qwen2 in vLLM.",
)
@options.as_json
def export(
    out: Path,
    folder: Path,
    engine: str,
    rank: int,
    reference: Reference,
    names: tuple[str, ...],
    bake_mean: bool,
    no_embeddings: bool,
    as_json: bool,
) -> None:
    """Write the experts of the artifact in OUT to FOLDER as LoRA adapters, one folder each.

    An adapter holds the changed matrices as far as its rank allows, and neither norms nor biases. The table
    shows how much of each expert is left out, and FOLDER/README.md repeats it. A checkpoint holds everything,
    bit for bit.

    Example: mergekit-mediator export OUT adapters --format vllm --rank 64

    Example: mergekit-mediator export OUT math --format checkpoint --expert math
    """
    verify_files(out, read_manifest(out))
    experts = StoredExperts(out, reference)
    if engine == "checkpoint":
        if bake_mean:
            raise click.UsageError(
                "--bake-mean belongs to adapters: leave it out, a checkpoint holds every weight"
            )
        _export_checkpoint(experts, folder, options.mixture(names), as_json)
        return
    one_rank = engine in _OF_ONE_RANK
    exported = export_adapters(
        experts, folder, rank, names or None, one_rank, bake_mean, not no_embeddings
    )
    model = experts.manifest.base.source if reference == "base" else str(out)
    if bake_mean:
        model = str(folder / BAKED)
    command = _COMMANDS[engine](model, folder, exported) if engine in _COMMANDS else None
    if as_json:
        figures: dict[str, Any] = {"experts": [expert.as_json() for expert in exported]}
        click.echo(json.dumps({**figures, "model": model, "command": command}, indent=1))
        return
    click.echo(tables.table(COLUMNS, [expert.cells() for expert in exported]))
    click.echo(f"\n{said_of_weights(exported, bake_mean)}")
    if command:
        click.echo(f"\n{command}")


def _export_checkpoint(
    experts: StoredExperts, folder: Path, mixture: dict[str, float] | None, as_json: bool
) -> None:
    """Write one plain model, and show its size."""
    if mixture is None:
        raise click.UsageError(
            f"--format checkpoint needs --expert NAME: one of {', '.join(experts.names)}"
        )
    size = export_checkpoint(experts, mixture, folder)
    if as_json:
        click.echo(json.dumps({"mixture": mixture, "bytes": size}, indent=1))
    else:
        click.echo(f"{folder}: a plain model of {tables.size(size)}, for any tool")
