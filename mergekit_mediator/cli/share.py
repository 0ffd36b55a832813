"""The command `push`: send an artifact to the Hub."""

import json
from pathlib import Path

import click

from mergekit_mediator.cli import options
from mergekit_mediator.cli.tables import size, table


@click.command()
@click.argument("out", type=options.directory)
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--revision", help="The branch to push to; it is made if there is none.")
@click.option("--create-pr", is_flag=True, help="Propose a pull request instead of a commit.")
@click.option("--overwrite", is_flag=True, help="Replace another model in the repository.")
@click.option("--dry-run", is_flag=True, help="Show the files of a push, and send nothing.")
@options.as_json
def push(
    out: Path,
    repo: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Send the artifact in OUT to the repository REPO on the Hub, in one commit.

    The generated part of its card is brought up to date first, and the examples of the card that is sent load REPO.
    An artifact is refused if it does not verify, or if its texts hold a token or a home directory. Run an interrupted
    push again: it sends only the rest.

    Example: mergekit-mediator push OUT user/name --private
    """
    from mergekit_mediator.cli.publish import refresh
    from mergekit_mediator.share.push import missing_sources, prepare
    from mergekit_mediator.share.push import push as send

    refresh(out)
    upload = prepare(out, repo)
    sizes = upload.sizes
    if not as_json:
        rows = [[name, size(count)] for name, count in sizes.items()]
        click.echo(table(["file", "bytes"], rows))
        click.echo(f"\n{len(sizes)} files, {size(sum(sizes.values()))}, to {repo}")
    address = None
    if not dry_run:
        for name in missing_sources(upload.manifest):
            click.echo(
                f"note: {name}: no such directory here, and no such repository on the Hub, or it is private: it is "
                "sent as the name of a repository; push from where the directory is to send its last part alone",
                err=True,
            )
        address = send(
            upload,
            repo,
            private=private,
            revision=revision,
            create_pr=create_pr,
            overwrite=overwrite,
        )
    if as_json:
        click.echo(json.dumps({"files": sizes, "bytes": sum(sizes.values()), "commit": address}))
    else:
        click.echo("nothing was sent: --dry-run" if address is None else f"sent: {address}")
