"""The options and arguments that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mergekit_mediator.cli.canvas import has_matplotlib
from mergekit_mediator.errors import ExportError
from mergekit_mediator.export.rank import Rank

directory = click.Path(exists=True, file_okay=False, path_type=Path)
as_json = click.option("--json", "as_json", is_flag=True, help="Print figures as JSON.")
trust_remote_code = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Let the models' own code run; read it first.",
)


class RankType(click.ParamType[Rank]):
    """The rank of adapters, see `Rank.parse`."""

    name = "rank|energy|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Rank:
        """Read a rank, a part of the squared change, or `auto`; refuse all else."""
        try:
            return Rank.parse(str(value))
        except ExportError as error:
            self.fail(str(error), param, ctx)


def plot(content: str) -> Callable[[Any], Any]:
    """The option `--plot FILE`; it is checked before the command does what takes long.

    Args:
        content: the content of the picture, for the help text.
    """
    kind = click.Path(dir_okay=False, path_type=Path)
    text = f"FILE.png or FILE.svg: draw {content}."
    return click.option("--plot", type=kind, callback=_picture, help=text)


def _picture(context: click.Context, option: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a picture that cannot be written.

    Raises:
        BadParameter: the suffix or the folder is none that a picture can have.
        UsageError: matplotlib is missing.
    """
    if path is None:
        return None
    if path.suffix.lower() not in (".png", ".svg"):
        raise click.BadParameter(f"FILE.png or FILE.svg is required, got {str(path)!r}")
    if not path.absolute().parent.is_dir():
        raise click.BadParameter(f"{path.parent}: there is no such folder: make it first")
    if not has_matplotlib():
        raise click.UsageError(
            "--plot needs matplotlib: pip install mergekit-mediator[plot]", context
        )
    return path


def mixture(texts: tuple[str, ...]) -> dict[str, float] | None:
    """Read NAME and NAME=WEIGHT texts: weights by expert, or None without any text."""
    weights = {}
    for text in texts:
        name, _, weight = text.partition("=")
        try:
            weights[name] = float(weight or 1.0)
        except ValueError as error:
            raise click.BadParameter(f"NAME or NAME=WEIGHT is required, got {text!r}") from error
    return weights or None
