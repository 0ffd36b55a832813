"""The commands that change the experts of an artifact: `remove-expert` and `rename-expert`."""

from pathlib import Path

import click

from mergekit_mediator.cli import options
from mergekit_mediator.store.manifest import Manifest


@click.command("remove-expert")
@click.argument("out", type=options.directory)
@click.argument("name")
def remove_expert(out: Path, name: str) -> None:
    """Remove expert NAME from the artifact in OUT; the files of the other experts stay as they are.

    The file of the expert goes. The average of layers that were merged with it still holds it, and the
    command says of which.

    Example: mergekit-mediator remove-expert OUT math
    """
    from mergekit_mediator.merge.editing.remove import remove_expert

    _show(remove_expert(out, name))


@click.command("rename-expert")
@click.argument("out", type=options.directory)
@click.argument("old")
@click.argument("new")
def rename_expert(out: Path, old: str, new: str) -> None:
    """Rename expert OLD of the artifact in OUT to NEW, also in the routers.

    Example: mergekit-mediator rename-expert OUT math algebra
    """
    from mergekit_mediator.merge.editing.rename import rename_expert

    _show(rename_expert(out, old, new))


def _show(manifest: Manifest) -> None:
    """Show the last change, the experts of the artifact, and whether its calibrated router is stale."""
    click.echo(manifest.history[-1].note)
    click.echo(f"experts: {', '.join(manifest.expert_names)}")
    if stale := (manifest.router or {}).get("stale"):
        click.echo(f"the calibrated router is stale: {stale}")
