"""The options and arguments that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mergekit_mediator.cli.canvas import has_matplotlib

directory = click.Path(exists=True, file_okay=False, path_type=Path)
as_json = click.option("--json", "as_json", is_flag=True, help="Print figures as JSON.")
trust_remote_code = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Let the models' own code run; read it first.",
)


class Rank(click.ParamType[int | float]):
    """A rank as an integer, or the part of the squared change to keep as a fraction."""

    name = "rank|energy"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | float:
        """Read a number; refuse all but a rank from 1 and a fraction between 0 and 1."""
        try:
            number = int(value) if str(value).isdigit() else float(value)
        except ValueError:
            number = 0
        if number < 1 if isinstance(number, int) else not 0 < number < 1:
            self.fail(
                f"a rank such as 64 or a part of the squared change such as 0.99 is required, got {value!r}",
                *(param, ctx),
            )
        return number


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
