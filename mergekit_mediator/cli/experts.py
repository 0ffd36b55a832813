"""The commands that change the experts of an artifact: add, remove, rename and requantize."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from mergekit_mediator.cli import options

if TYPE_CHECKING:
    from mergekit_mediator.merge.editing.workspace import Edited


_base = click.option(
    "--base",
    type=options.directory,
    help="The directory of the base, if it is not where the manifest says.",
)


@click.command("add-expert")
@click.argument("out", type=options.directory)
@click.argument("model")
@click.option("--name", required=True, help="The name of the expert.")
@click.option("--keep", type=float, help="The part of its gain to keep, such as 0.99.")
@click.option("--bits", type=float, help="Bits per parameter.")
@click.option("--budget", help="The size of the whole directory with the expert: 1.5x or 24GB.")
@click.option("--density", type=float, help="The fraction of the differences to keep.")
@click.option(
    "--values",
    type=click.Choice(["exact", "int8", "int4", "sign", "random_sign"]),
    help="The form of the values.",
)
@click.option("--rank", type=int, help="The rank of each difference.")
@_base
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="FILE.jsonl: prompts of the expert, to which the calibrated router is fitted again.",
)
@options.trust_remote_code
def add_expert(
    out: Path,
    model: str,
    name: str,
    base: Path | None,
    data: Path | None,
    trust_remote_code: bool,
    **storage: Any,
) -> None:
    """Add MODEL, a fine-tune of the same base, as an expert to the artifact in OUT.

    All other experts and the dense expert stay as they are. MODEL is a directory or a repository, or an
    adapter of the base. It is stored as the other experts are, unless --keep, --bits, --budget, --density or
    --rank says otherwise. The expert has its own version of routed layers only: averaged layers stay as they are,
    and the command prints how much of its change is there.

    Example: mergekit-mediator add-expert OUT models/law --name law --data law.jsonl
    """
    from mergekit_mediator.merge.editing.add import add_expert

    given = {key: value for key, value in storage.items() if value is not None}
    _show(
        add_expert(
            out, model, name, base=base, data=data, trust_remote_code=trust_remote_code, **given
        )
    )


@click.command("remove-expert")
@click.argument("out", type=options.directory)
@click.argument("name")
@click.option(
    "--rebuild",
    is_flag=True,
    help="Merge the original models again without it; this needs them all.",
)
@_base
@options.trust_remote_code
def remove_expert(
    out: Path, name: str, rebuild: bool, base: Path | None, trust_remote_code: bool
) -> None:
    """Remove expert NAME from the artifact in OUT; the files of the other experts stay as they are.

    The file of the expert goes. The average of layers that were merged with it still holds it, and the
    command says of which. With --rebuild nothing holds it any more.

    Example: mergekit-mediator remove-expert OUT math
    """
    if rebuild:
        from mergekit_mediator.merge.editing.rebuild import rebuild_without

        _show(rebuild_without(out, name, base=base, trust_remote_code=trust_remote_code))
        return
    from mergekit_mediator.merge.editing.remove import remove_expert

    if base is not None:
        raise click.UsageError("--base is read with --rebuild alone: leave it out")
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


@click.command()
@click.argument("out", type=options.directory)
@click.option("--bits", type=float, help="Bits per parameter, fewer than now.")
@click.option(
    "--values",
    type=click.Choice(["int8", "int4", "sign"]),
    help="The form of the values of experts that were stored by `density`.",
)
@click.option("--expert", "experts", multiple=True, help="NAME: only this expert; repeatable.")
def requantize(
    out: Path,
    bits: float | None,
    values: Literal["int8", "int4", "sign"] | None,
    experts: tuple[str, ...],
) -> None:
    """Store the experts of the artifact in OUT in fewer bytes; the dense expert stays as it is.

    The stored experts are decoded and encoded again: the error that the command prints is relative to what
    was stored. A merge of the original models at the same rate is as small and nearer to them.

    Example: mergekit-mediator requantize OUT --bits 1
    """
    from mergekit_mediator.merge.editing.requantize import requantize

    if (bits is None) == (values is None):
        raise click.UsageError("give either --bits or --values")
    _show(requantize(out, bits=bits, values=values, experts=experts))


def _show(edited: "Edited") -> None:
    """Show the changes, the experts of the artifact, and whether its calibrated router is stale."""
    manifest, changes = edited
    for change in changes:
        click.echo(change.note)
    click.echo(f"experts: {', '.join(manifest.expert_names)}")
    if stale := (manifest.router or {}).get("stale"):
        click.echo(f"the calibrated router is stale: {stale}")
