"""The command `config`: files that deploy engines, gateways and routers."""

import shlex
from pathlib import Path

import click
import yaml

from mergekit_mediator.engines.deployments import DEPLOYMENTS, Deployment, dockerfile
from mergekit_mediator.export.start_commands import vllm_rank
from mergekit_mediator.share.pull import fetch_manifest


class _Dumper(yaml.SafeDumper):
    """A dumper that writes repeated content again: references in YAML are hard to read and to edit."""

    def ignore_aliases(self, data: object) -> bool:
        """Tell the dumper to write every object without a reference."""
        return True


@click.command()
@click.argument("tool", type=click.Choice(["vllm", "dockerfile", *DEPLOYMENTS]))
@click.argument("out")
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="The largest rank of the adapters; `export` prints their ranks.",
)
@click.option(
    "--replicas",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="The number of engines.",
)
@click.option(
    "--image", default=Deployment.image, show_default=True, help="The image of the containers."
)
@click.option(
    "--adapters",
    default="",
    help="The address from which Ray loads exported adapters, such as s3://bucket/adapters.",
)
def config(tool: str, out: str, rank: int, replicas: int, image: str, adapters: str) -> None:
    """Print the file with which TOOL serves the artifact in OUT, a directory or a repository on the Hub.

    `vllm` prints a command. `dockerfile` prints the image's file for `compose` and `kubernetes`, which start
    vLLM with the plugin behind a gateway.

    Example: mergekit-mediator config compose OUT --replicas 2
    """
    experts = fetch_manifest(out).expert_names
    model = str(Path(out).resolve()) if Path(out).is_dir() else out
    deployment = Deployment(model, experts, vllm_rank(rank), replicas, image, adapters)
    if tool == "vllm":
        click.echo(f"VLLM_PLUGINS=mediator {shlex.join(deployment.engine_command)}")
    elif tool == "dockerfile":
        click.echo(dockerfile(), nl=False)
    else:
        content = DEPLOYMENTS[tool](deployment)
        documents = content if isinstance(content, list) else [content]
        click.echo(yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False), nl=False)
