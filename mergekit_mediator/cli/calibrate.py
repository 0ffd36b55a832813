"""The command `calibrate`: fit the router of an artifact to example prompts."""

import json
from pathlib import Path
from typing import Literal

import click

from mergekit_mediator.cli import options
from mergekit_mediator.errors import RoutingError


@click.command()
@click.argument("out", type=options.directory)
@click.option("--data", multiple=True, help="NAME=FILE.jsonl: example prompts of expert NAME.")
@click.option(
    "--add", multiple=True, help="NAME=FILE.jsonl: as --data; the other experts stay as they are."
)
@click.option(
    "--features",
    type=click.Choice(["hidden", "embedding"]),
    default="hidden",
    show_default=True,
    help="Hidden states of the dense expert, or embeddings without a forward pass.",
)
@click.option(
    "--seed", default=0, show_default=True, help="The seed of the split of prompts into parts."
)
@options.trust_remote_code
@options.as_json
def calibrate(
    out: Path,
    data: tuple[str, ...],
    add: tuple[str, ...],
    features: Literal["embedding", "hidden"],
    seed: int,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Fit the router of the artifact in OUT to example prompts: 20 per expert are enough to work.

    The generated part of the artifact's card is brought up to date. A line of FILE is {"prompt": "..."} or {"messages": [...]}.

    Example: mergekit-mediator calibrate OUT --data math=math.jsonl --data code=code.jsonl
    """
    from mergekit_mediator.cli.publish import refresh
    from mergekit_mediator.cli.tables import calibration_report
    from mergekit_mediator.models.loading import load_plain, load_tokenizer
    from mergekit_mediator.route.calibrate import calibrate_artifact
    from mergekit_mediator.store.manifest import read_manifest
    from mergekit_mediator.store.verification import verify_files

    if bool(data) == bool(add):
        raise click.UsageError("give --data for all experts, or --add for some")
    files = _files(data or add)
    manifest = read_manifest(out)
    if data:
        missing = [name for name in manifest.expert_names if name not in files]
        if missing:
            raise click.UsageError(
                "--data must name the prompts of every expert, and it names none for "
                f"{', '.join(missing)}: add them, or use --add"
            )
    verify_files(out, manifest)
    tokenizer = load_tokenizer(out, trust_remote_code)
    if tokenizer is None:
        raise RoutingError(
            f"{out}: the artifact has no tokenizer, and a prompt needs one: merge from a base that "
            "has a tokenizer"
        )
    result = calibrate_artifact(
        out,
        load_plain(out, trust_remote_code=trust_remote_code),
        tokenizer,
        files,
        kind=features,
        seed=seed,
        manifest=manifest,
    )
    refresh(out)
    for warning in result.warnings:
        click.echo(f"warning: {warning}", err=True)
    figures = result.figures
    click.echo(json.dumps(figures, indent=1) if as_json else calibration_report(figures))


def _files(texts: tuple[str, ...]) -> dict[str, Path]:
    """Read NAME=FILE.jsonl texts: the file of each expert by its name."""
    files: dict[str, Path] = {}
    for text in texts:
        name, _, path = text.partition("=")
        if not name or not path:
            raise click.BadParameter(f"NAME=FILE.jsonl is required, got {text!r}")
        if name in files:
            raise click.BadParameter(f"{name!r} is named twice: put its prompts into one file")
        files[name] = Path(path)
    return files
