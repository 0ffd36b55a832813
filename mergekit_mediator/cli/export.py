"""The command `export`: write an artifact's experts in forms that other tools load."""

import json
from pathlib import Path
from typing import Any

import click

from mergekit_mediator.cli import options, tables
from mergekit_mediator.errors import ExportError
from mergekit_mediator.export.baked import BAKED
from mergekit_mediator.export.card import said_of_weights
from mergekit_mediator.export.checkpoint import export_checkpoint
from mergekit_mediator.export.experts import Reference, StoredExperts
from mergekit_mediator.export.figures import COLUMNS, ExportedExpert, said_of_ranks
from mergekit_mediator.export.folder import export_adapters, export_shira
from mergekit_mediator.export.rank import Rank
from mergekit_mediator.export.start_commands import (
    llama_cpp_commands,
    sglang_command,
    vllm_command,
)
from mergekit_mediator.models.prompt_files import read_prompts
from mergekit_mediator.store.manifest import read_manifest, verify_files

_COMMANDS = {"vllm": vllm_command, "sglang": sglang_command, "llama.cpp": llama_cpp_commands}
_OF_ONE_RANK = {"sglang", "llama.cpp"}  # engines that need one rank for all modules of an adapter


class _Rank(click.ParamType[Rank]):
    """The rank of adapters, see `Rank.parse`."""

    name = "rank|energy|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Rank:
        """Read a rank, a part of the squared change, or `auto`; refuse all else."""
        try:
            return Rank.parse(str(value))
        except ExportError as error:
            self.fail(str(error), param, ctx)


@click.command()
@click.argument("out", type=options.directory)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "engine",
    type=click.Choice(["peft", "peft-shira", "vllm", "sglang", "llama.cpp", "checkpoint"]),
    default="peft",
    show_default=True,
    help="The tool that loads the adapters; for an engine, its commands are printed too. `peft-shira` writes the "
    "changed values of linear layers instead of factors. `checkpoint` writes one plain model.",
)
@click.option(
    "--rank",
    type=_Rank(),
    default="64",
    show_default=True,
    help="The largest rank of a module, such as 64; or the part of its squared change to keep, such as 0.99; or "
    "`auto`, for each expert the least of 8, 16, 32, 64, 128, 256 that is predicted to keep 99.99% of its gain "
    "(`auto:0.99` for 99%); --prompts measure it instead. An expert of a smaller rank keeps its own rank.",
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
@click.option(
    "--drop",
    is_flag=True,
    help="Leave out what the form cannot hold, such as norms and biases; without it, this is refused.",
)
@click.option(
    "--prompts",
    "prompts_file",
    type=click.Path(exists=True, path_type=Path),
    help="A file of prompts (JSON lines): compare the answers of each expert and its adapter.",
)
@options.as_json
def export(
    out: Path,
    folder: Path,
    engine: str,
    rank: Rank,
    reference: Reference,
    names: tuple[str, ...],
    bake_mean: bool,
    no_embeddings: bool,
    drop: bool,
    prompts_file: Path | None,
    as_json: bool,
) -> None:
    """Write the experts of the artifact in OUT to FOLDER as adapters, one folder each.

    A LoRA adapter holds the changed matrices as far as its rank allows, and neither norms nor biases. A SHiRA
    adapter holds the changed values of linear layers exactly. The table and the cards show how much of each expert
    is left out. A checkpoint holds everything, bit for bit.

    Example: mergekit-mediator export OUT adapters --format vllm --rank 64 --drop

    Example: mergekit-mediator export OUT adapters --rank auto

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
    prompts = read_prompts(prompts_file) if prompts_file else ()
    if engine == "peft-shira":
        if bake_mean or no_embeddings:
            raise click.UsageError("--bake-mean and --no-embeddings belong to LoRA: leave them out")
        exported = export_shira(experts, folder, names or None, drop=drop, prompts=prompts)
    else:
        exported = export_adapters(
            *(experts, folder, rank.largest, names or None, engine in _OF_ONE_RANK),
            energy=rank.energy,
            keep=rank.keep,
            embeddings=not no_embeddings,
            drop=drop,
            bake_mean=bake_mean,
            prompts=prompts,
        )
    model = experts.manifest.base.source if reference == "base" else str(out)
    if bake_mean:
        model = str(folder / BAKED)
    command = _COMMANDS[engine](model, folder, exported) if engine in _COMMANDS else None
    if as_json:
        figures: dict[str, Any] = {"experts": [expert.as_json() for expert in exported]}
        click.echo(json.dumps({**figures, "model": model, "command": command}, indent=1))
        return
    click.echo(_report(exported))
    if chosen := said_of_ranks(exported):
        click.echo(f"\n{chosen}")
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


def _report(exported: list[ExportedExpert]) -> str:
    """Make the table of the adapters."""
    rows = [
        [
            *(*expert.cells(), tables.size(expert.bytes)),
            *([f"{expert.answers.divergence:.3g}"] if expert.answers else []),
        ]
        for expert in exported
    ]
    answers = ["KL of answers, nats"] if exported[0].answers else []
    return tables.table([*COLUMNS, "size", *answers], rows)
