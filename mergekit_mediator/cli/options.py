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
