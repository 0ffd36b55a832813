"""The options and arguments that several commands share."""

from pathlib import Path

import click

directory = click.Path(exists=True, file_okay=False, path_type=Path)
as_json = click.option("--json", "as_json", is_flag=True, help="Print figures as JSON.")
trust_remote_code = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Let the models' own code run; read it first.",
)


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
