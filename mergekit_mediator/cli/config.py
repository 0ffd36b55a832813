"""The command `config`: files that put engines and routers together."""

import shlex
from pathlib import Path

import click
import yaml

from mergekit_mediator.engines.deployments import DEPLOYMENTS, Deployment, dockerfile
from mergekit_mediator.export.start_commands import vllm_rank
from mergekit_mediator.models.loading import local_directory
from mergekit_mediator.store.manifest import read_manifest


class _Dumper(yaml.SafeDumper):
    """Writes what occurs twice twice: YAML's references are hard to read and to edit."""

    def ignore_aliases(self, data: object) -> bool:
        """Say so of everything."""
        return True


@click.command()
@click.argument("tool", type=click.Choice(["vllm", "dockerfile", *DEPLOYMENTS]))
@click.argument("out")
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Of the adapters, as `export` says.",
)
@click.option("--replicas", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--image", default=Deployment.image, show_default=True, help="Of containers.")
@click.option(
    "--adapters",
    default="",
    help="Where Ray finds exported adapters, such as s3://bucket/adapters.",
)
def config(tool: str, out: str, rank: int, replicas: int, image: str, adapters: str) -> None:
    """Print the file with which TOOL serves the artifact in OUT, a directory or a repository on the Hub.

    `vllm` is a command; `dockerfile` is the image of `compose` and `kubernetes`, which start vLLM with the
    plugin behind a gateway.

    Example: mergekit-mediator config compose OUT --replicas 2
    """
    experts = read_manifest(local_directory(out, None)).expert_names
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
