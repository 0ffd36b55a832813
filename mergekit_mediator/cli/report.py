"""The command `report`: one HTML page about an artifact."""

import json
from pathlib import Path

import click

from mergekit_mediator.cli import options
from mergekit_mediator.errors import OutputError


@click.command()
@click.argument("out", type=options.directory)
@click.option(
    "--out",
    "page",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file of the page.  [default: OUT/report.html]",
)
@options.as_json
def report(out: Path, page: Path | None, as_json: bool) -> None:
    """Write one page about the artifact in OUT: experts, layers, sizes, router, evaluation and limits.

    The page has no scripts and needs no network. The generated part of the model card and its pictures are
    brought up to date, too.

    Example: mergekit-mediator report OUT
    """
    from mergekit_mediator.cli.inspection import inspect_figures
    from mergekit_mediator.cli.publish import refresh
    from mergekit_mediator.cli.report_page import report_page
    from mergekit_mediator.store import durable
    from mergekit_mediator.store.evaluation import read_evaluation
    from mergekit_mediator.store.manifest import read_manifest

    page = page or out / "report.html"
    manifest = read_manifest(out)
    evaluation = read_evaluation(out, manifest)
    figures = inspect_figures(out, manifest)
    text = report_page(out.resolve().name, manifest, figures, evaluation)
    try:
        durable.write_text(page, text)
    except OSError as error:
        raise OutputError(f"{page}: cannot be written: {error.strerror}") from error
    refresh(out)
    click.echo(json.dumps({"report": str(page)}) if as_json else f"{page} is written")
