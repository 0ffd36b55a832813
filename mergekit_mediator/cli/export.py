"""The command `export`: write an artifact's experts in forms that other tools load."""

import json
from pathlib import Path
from typing import Any

import click

from mergekit_mediator.cli import options, tables
from mergekit_mediator.export.checkpoint import export_checkpoint
from mergekit_mediator.export.experts import Reference, StoredExperts
from mergekit_mediator.export.folder import ExportedExpert, export_adapters
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
@options.as_json
def export(
    out: Path,
    folder: Path,
    engine: str,
    rank: int,
    reference: Reference,
    names: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write the experts of the artifact in OUT to FOLDER as LoRA adapters, one folder each.

    An adapter holds the changed matrices as far as its rank allows, and neither norms nor biases. The table
    shows how much of each expert is left out. A checkpoint holds everything, bit for bit.

    Example: mergekit-mediator export OUT adapters --format vllm --rank 64

    Example: mergekit-mediator export OUT math --format checkpoint --expert math
    """
    verify_files(out, read_manifest(out))
    experts = StoredExperts(out, reference)
    if engine == "checkpoint":
        _export_checkpoint(experts, folder, options.mixture(names), as_json)
        return
    exported = export_adapters(experts, folder, rank, names or None, engine in _OF_ONE_RANK)
    model = experts.manifest.base.source if reference == "base" else str(out)
    command = _COMMANDS[engine](model, folder, exported) if engine in _COMMANDS else None
    if as_json:
        figures: dict[str, Any] = {"experts": [expert.as_json() for expert in exported]}
        click.echo(json.dumps({**figures, "command": command}, indent=1))
        return
    click.echo(_report(exported))
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


def _report(exported: list[ExportedExpert]) -> str:
    """Make the table of the adapters."""
    rows = [
        [
            expert.name,
            str(expert.rank),
            f"{100 * expert.error:.2f}",
            str(expert.dropped),
            f"{100 * expert.dropped_part:.2f}",
            tables.size(expert.bytes),
        ]
        for expert in exported
    ]
    header = ["adapter", "rank", "left out by the rank, %", "weights left out", "of the change, %"]
    return tables.table([*header, "size"], rows)
