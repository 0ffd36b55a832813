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
from mergekit_mediator.export.figures import COLUMNS, ExportedExpert, said_of_ranks
from mergekit_mediator.export.folder import export_adapters, export_shira
from mergekit_mediator.export.gguf.folder import (
    DENSE_FILE,
    export_gguf_adapters,
    export_gguf_model,
    is_written,
)
from mergekit_mediator.export.rank import Rank
from mergekit_mediator.export.start_commands import (
    llama_cpp_commands,
    sglang_command,
    vllm_command,
)
from mergekit_mediator.models.prompt_files import read_prompts
from mergekit_mediator.store.manifest import read_manifest
from mergekit_mediator.store.verification import verify_files

_MODELS = ("checkpoint", "gguf")  # one plain model instead of adapters
_FORMATS = ("peft", "peft-shira", "vllm", "sglang", "gguf-lora", "llama.cpp", *_MODELS)


@click.command()
@click.argument("out", type=options.directory)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "engine",
    type=click.Choice(_FORMATS),
    default="peft",
    show_default=True,
    help="The tool that loads the adapters; for an engine, its commands are printed too. `peft-shira` writes the "
    "changed values of linear layers instead of factors. `gguf-lora` writes adapters for llama.cpp, and `llama.cpp` "
    "the dense expert, too. `checkpoint` and `gguf` write one plain model.",
)
@click.option(
    "--rank",
    type=options.RankType(),
    default="64",
    show_default=True,
    help="The largest rank of a module, such as 64; or the part of its squared change to keep, such as 0.99; or "
    "`auto`, for each expert the least of 8, 16, 32, 64, 128, 256 that is predicted to keep 99.9% of its gain "
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
    help="Export this expert only; may be repeated. `checkpoint` and `gguf` blend NAME=WEIGHT; without it, `gguf` "
    "writes the dense expert.",
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
    _check(engine, bake_mean, no_embeddings)
    if engine in _MODELS:
        _export_model(experts, folder, engine, options.mixture(names), as_json)
        return
    prompts = read_prompts(prompts_file) if prompts_file else ()
    common: dict[str, Any] = {"drop": drop, "prompts": prompts}
    lora: dict[str, Any] = {
        **{"energy": rank.energy, "keep": rank.keep},
        **{"embeddings": not no_embeddings, "bake_mean": bake_mean},
        **common,
    }
    is_gguf = engine == "gguf-lora" or (engine == "llama.cpp" and is_written(out))
    has_model = is_gguf and engine == "llama.cpp" and reference == "dense"
    chosen = names or None
    if engine == "peft-shira":
        exported = export_shira(experts, folder, chosen, **common)
    elif is_gguf:
        exported = export_gguf_adapters(
            experts, folder, rank.largest, chosen, with_model=has_model, **lora
        )
    else:
        one_rank = engine in ("sglang", "llama.cpp")
        exported = export_adapters(experts, folder, rank.largest, chosen, one_rank, **lora)
    model = experts.manifest.base.source if reference == "base" else str(out)
    if has_model:
        model = str(folder / DENSE_FILE)
    elif bake_mean:
        model = str(folder / BAKED)
    command = _command(engine, model, folder, exported)
    if as_json:
        figures = [expert.as_json() for expert in exported]
        result = {"experts": figures, "model": model, "command": command}
        click.echo(json.dumps(result, indent=1))
    else:
        _show(exported, bake_mean, command)


def _check(engine: str, bake_mean: bool, no_embeddings: bool) -> None:
    """Refuse options that the format has not."""
    if engine in _MODELS and bake_mean:
        raise click.UsageError(
            f"--bake-mean belongs to adapters: leave it out, a {engine} holds every weight"
        )
    if engine == "peft-shira" and (bake_mean or no_embeddings):
        raise click.UsageError("--bake-mean and --no-embeddings belong to LoRA: leave them out")
    if engine == "gguf-lora" and bake_mean:
        raise click.UsageError(
            "--bake-mean writes a model, and gguf-lora writes none: use --format llama.cpp"
        )


def _command(engine: str, model: str, folder: Path, exported: list[ExportedExpert]) -> str | None:
    """Make the commands that start an engine; None for other formats."""
    if engine == "vllm":
        return vllm_command(model, folder, exported)
    if engine == "sglang":
        return sglang_command(model, folder, exported)
    if engine == "llama.cpp":
        return llama_cpp_commands(model, folder, exported)
    return None


def _export_model(
    experts: StoredExperts,
    folder: Path,
    engine: str,
    mixture: dict[str, float] | None,
    as_json: bool,
) -> None:
    """Write one plain model, and show its size."""
    if engine == "gguf":
        place = export_gguf_model(experts, mixture, folder)
        size, readers = place.stat().st_size, "llama.cpp"
    elif mixture is None:
        raise click.UsageError(
            f"--format checkpoint needs --expert NAME: one of {', '.join(experts.names)}"
        )
    else:
        place, readers = folder, "any tool"
        size = export_checkpoint(experts, mixture, folder)
    if as_json:
        click.echo(
            json.dumps({"mixture": mixture or {}, "path": str(place), "bytes": size}, indent=1)
        )
    else:
        click.echo(f"{place}: a plain model of {tables.size(size)}, for {readers}")


def _show(exported: list[ExportedExpert], bake_mean: bool, command: str | None) -> None:
    """Show the figures of the adapters, and the commands that load them."""
    click.echo(_table(exported))
    if ranks := said_of_ranks(exported):
        click.echo(f"\n{ranks}")
    click.echo(f"\n{said_of_weights(exported, bake_mean)}")
    if command:
        click.echo(f"\n{command}")


def _table(exported: list[ExportedExpert]) -> str:
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
