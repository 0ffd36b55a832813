"""Calls the commands as a shell does."""

import json

import click.testing
import yaml

from mergekit_mediator.cli.main import main


def call(*arguments):
    result = click.testing.CliRunner().invoke(main, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def figures(*arguments):
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def write(config, path):
    path.write_text(yaml.safe_dump(config))
    return path
