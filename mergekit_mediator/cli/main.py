"""The program `mergekit-mediator`, and the commands `inspect` and `verify`."""

import json
import logging
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import click

from mergekit_mediator import __version__
from mergekit_mediator.cli import options
from mergekit_mediator.cli.group import Commands


@click.group(cls=Commands)
@click.option("-v", "--verbose", is_flag=True, help="Show a traceback if a command fails.")
@click.version_option(__version__)
def main(verbose: bool) -> None:
    """Merge fine-tunes into one checkpoint plus small experts, and route each request.

    Example: mergekit-mediator merge config.yml OUT && mergekit-mediator generate OUT "2 + 2 ="
    """
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR)


@main.command()
@click.argument("out")
@options.plot("conflict and bytes by layer, and what the calibrated router confuses")
@options.as_json
def inspect(out: str, plot: Path | None, as_json: bool) -> None:
    """Show experts, conflict, routed layers and sizes of the artifact in OUT.

    OUT is a directory, or a repository on the Hub, of which the manifest and the headers of the
    experts' files are read.

    Example: mergekit-mediator inspect OUT --plot artifact.svg
    """
    from mergekit_mediator.cli import inspection
    from mergekit_mediator.store.manifest import read_manifest

    with _headers(out) as root:
        figures = inspection.inspect_figures(root, read_manifest(root))
    click.echo(json.dumps(figures, indent=1) if as_json else inspection.inspect_report(figures))
    if plot is not None:
        from mergekit_mediator.cli.plots import plot_artifact

        plot_artifact(figures, plot)


def _headers(out: str) -> AbstractContextManager[Path]:
    """A directory that `inspect` can read: OUT itself, or what is fetched of a repository."""
    if Path(out).is_dir():
        return nullcontext(Path(out))
    from mergekit_mediator.share.headers import fetched_headers

    return fetched_headers(out)


@main.command()
@click.argument("out")
@click.option("--base", type=options.directory, help="The directory of the base model.")
@options.as_json
def verify(out: str, base: Path | None, as_json: bool) -> None:
    """Check every digest of the artifact in OUT, and the digests of the base that it was merged from.

    OUT is a directory, or a repository on the Hub, which states the digests of its large files: they
    are compared without a download.

    Example: mergekit-mediator verify OUT --base models/base
    """
    from mergekit_mediator.store.manifest import read_manifest
    from mergekit_mediator.store.verification import verify_base, verify_files

    if Path(out).is_dir():
        manifest = read_manifest(Path(out))
        verify_files(Path(out), manifest)
    else:
        from mergekit_mediator.share.verify import verify_repository

        manifest = verify_repository(out)
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


if __name__ == "__main__":
    sys.exit(main())
