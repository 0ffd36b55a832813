"""The commands, thin: options in, one call, figures out."""

import json
import logging
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import click

from mergekit_mediator import __version__
from mergekit_mediator.errors import MediatorError, RoutingError

# These need libraries that take seconds to import: only when they are called.
_LAZY = {
    "merge": "merge",
    "plan": "merge",
    "demo": "demo",
    "evaluate": "evaluate",
    "export": "export",
    "classify": "services",
    "config": "config",
    "gateway": "services",
}


class _Commands(click.Group):
    """Imports a command when it is asked for; ends with one readable line where it fails."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_LAZY})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _LAZY:
            module = import_module(f"mergekit_mediator.cli.{_LAZY[cmd_name]}")
            command: click.Command = getattr(module, cmd_name)
            return command
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(_SUMMARY.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MediatorError as error:
            if ctx.params.get("verbose"):
                raise
            raise click.ClickException(str(error)) from error


_SUMMARY = {
    "calibrate": "Fit the router of an artifact to example prompts.",
    "classify": "Serve the experts' probabilities for each text over HTTP.",
    "config": "Print the files with which engines and routers serve an artifact.",
    "demo": "Merge four skills of a small model and see each prompt routed.",
    "evaluate": "Score an artifact and its rivals on tasks.",
    "export": "Write experts as LoRA adapters that other tools load.",
    "gateway": "Route requests to engines that hold the exported experts.",
    "generate": "Answer prompts, each with the experts that it needs.",
    "inspect": "Show experts, conflict, routed layers and sizes.",
    "merge": "Merge models into an artifact.",
    "plan": "Show what a merge will read, write and need, before it runs.",
    "verify": "Check every digest of an artifact, and its base.",
}

_directory = click.Path(exists=True, file_okay=False, path_type=Path)
_json = click.option("--json", "as_json", is_flag=True, help="Print figures as JSON.")
_trust = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Let code run that comes with the model; read it first.",
)


@click.group(cls=_Commands)
@click.option("-v", "--verbose", is_flag=True, help="Show a traceback where a command fails.")
@click.version_option(__version__)
def main(verbose: bool) -> None:
    """Merge fine-tunes into one checkpoint plus small experts, and route each request.

    Example: mergekit-mediator merge config.yml OUT && mergekit-mediator generate OUT "2 + 2 ="
    """
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR)


@main.command()
@click.argument("out", type=_directory)
@_json
def inspect(out: Path, as_json: bool) -> None:
    """Show experts, conflict, routed layers and sizes of the artifact in OUT.

    Example: mergekit-mediator inspect OUT
    """
    from mergekit_mediator.cli import inspection
    from mergekit_mediator.store.manifest import read_manifest

    figures = inspection.inspect_figures(out, read_manifest(out))
    click.echo(json.dumps(figures, indent=1) if as_json else inspection.inspect_report(figures))


@main.command()
@click.argument("out", type=_directory)
@click.option("--base", type=_directory, help="Where the base model is on this machine.")
@_json
def verify(out: Path, base: Path | None, as_json: bool) -> None:
    """Check every digest of the artifact in OUT, and that its base is the one it was made from.

    Example: mergekit-mediator verify OUT --base models/base
    """
    from mergekit_mediator.store.manifest import read_manifest, verify_base, verify_files

    manifest = read_manifest(out)
    verify_files(out, manifest)
    local = base or Path(manifest.base.source)
    checked = local.is_dir()
    if checked:
        verify_base(local, manifest)
    if as_json:
        click.echo(json.dumps({"files": len(manifest.files), "base_checked": checked}))
        return
    click.echo(f"{len(manifest.files)} files match the manifest")
    unchecked = "the base is not on this machine: name its directory with --base to check it"
    click.echo(f"base {local} matches the manifest" if checked else unchecked)


@main.command()
@click.argument("out", type=_directory)
@click.option("--data", multiple=True, help="NAME=FILE.jsonl: example prompts of expert NAME.")
@click.option("--add", multiple=True, help="As --data, keeping what is known of the others.")
@click.option(
    "--features",
    type=click.Choice(["hidden", "embedding"]),
    default="hidden",
    show_default=True,
    help="Hidden states of the dense expert, or embeddings without a forward pass.",
)
@click.option("--seed", default=0, show_default=True)
@_trust
@_json
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

    A line of FILE is {"prompt": "..."} or {"messages": [...]}.

    Example: mergekit-mediator calibrate OUT --data math=math.jsonl --data code=code.jsonl
    """
    from mergekit_mediator.cli import tables as report
    from mergekit_mediator.models.loading import load_plain, load_tokenizer
    from mergekit_mediator.route.calibrate import calibrate_artifact
    from mergekit_mediator.store.manifest import read_manifest, verify_files

    if bool(data) == bool(add):
        raise click.UsageError("give --data for all experts, or --add for some")
    files = {}
    for text in data or add:
        name, _, path = text.partition("=")
        if not name or not path:
            raise click.BadParameter(f"{text!r}: NAME=FILE.jsonl required")
        if name in files:
            raise click.BadParameter(f"{name!r} is given twice: put its prompts into one file")
        files[name] = Path(path)
    manifest = read_manifest(out)
    if data:
        absent = [name for name in manifest.expert_names if name not in files]
        if absent:
            raise click.UsageError(f"no data for {', '.join(absent)}: give it, or use --add")
    verify_files(out, manifest)
    tokenizer = load_tokenizer(out, trust_remote_code)
    if tokenizer is None:
        raise RoutingError(f"{out}: has no tokenizer, without which no prompt can be read")
    result = calibrate_artifact(
        out,
        load_plain(out, trust_remote_code=trust_remote_code),
        tokenizer,
        files,
        kind=features,
        seed=seed,
        manifest=manifest,
    )
    for warning in result.warnings:
        click.echo(f"warning: {warning}", err=True)
    if as_json:
        click.echo(json.dumps(result.figures, indent=1))
        return
    click.echo(report.calibration_report(result.figures))


@main.command()
@click.argument("out")
@click.argument("prompts", nargs=-1, required=True)
@click.option("--expert", "experts", multiple=True, help="NAME or NAME=WEIGHT, instead of routing.")
@click.option("--router", help="Route by this router instead of the default one.")
@click.option(
    "--policy",
    type=click.Choice(["hard", "soft", "auto"]),
    default="auto",
    show_default=True,
    help="One expert, a blend, or whichever the router is sure enough for.",
)
@click.option(
    "--ood-action",
    type=click.Choice(["blend", "dense", "fallback", "refuse"]),
    default="blend",
    show_default=True,
    help="What is done with a prompt unlike all that the calibrated router knows.",
)
@click.option("--fallback", help="The expert of --ood-action fallback, or dense.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@_trust
@_json
def generate(
    out: str,
    prompts: tuple[str, ...],
    experts: tuple[str, ...],
    router: str | None,
    policy: Literal["hard", "soft", "auto"],
    ood_action: Literal["blend", "dense", "fallback", "refuse"],
    fallback: str | None,
    max_new_tokens: int,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Answer PROMPTS with the artifact in OUT, a directory or a repository on the Hub.

    Example: mergekit-mediator generate OUT "What is 12 + 30?" "Reverse: a b c"
    """
    from mergekit_mediator.cli.answer import answer
    from mergekit_mediator.serve.model import MediatorModel

    if (ood_action == "fallback") != (fallback is not None):
        raise click.UsageError("--ood-action fallback and --fallback NAME go together")
    model = MediatorModel.from_pretrained(out, trust_remote_code=trust_remote_code)
    model.policy, model.ood_action, model.fallback = policy, ood_action, fallback
    mixture = _mixture(experts)
    results = answer(model, prompts, max_new_tokens, mixture=mixture, router=router)
    if as_json:
        click.echo(json.dumps(results, indent=1))
        return
    for result in results:
        weights = ", ".join(f"{name} {p:.2f}" for name, p in result["mixture"].items()) or "dense"
        note = "" if result["entropy"] is None else f", entropy {result['entropy']:.2f} nats"
        click.echo(f"[{weights}{note}] {result['answer']}")


def _mixture(experts: tuple[str, ...]) -> dict[str, float] | None:
    mixture = {}
    for text in experts:
        name, _, weight = text.partition("=")
        try:
            mixture[name] = float(weight or 1.0)
        except ValueError as error:
            raise click.BadParameter(f"{text!r}: NAME or NAME=WEIGHT required") from error
    return mixture or None


if __name__ == "__main__":
    sys.exit(main())
