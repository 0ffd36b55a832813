"""The commands that serve over HTTP: `classify` and `gateway`."""

import os
from importlib import import_module
from types import ModuleType
from typing import Any

import click

from mergekit_mediator.engines.deciders import Decider, choose_decider
from mergekit_mediator.engines.settings import RouterName, ServiceSettings
from mergekit_mediator.errors import EngineError
from mergekit_mediator.models.loading import local_directory
from mergekit_mediator.store.manifest import Manifest, read_manifest, verify_files

_router = click.option(
    "--router",
    type=click.Choice(["auto", "embedding", "hidden", "response", "likelihood"]),
    default="auto",
    show_default=True,
    help="auto is one that needs no second model in memory, or the artifact's best.",
)
_host = click.option("--host", default="127.0.0.1", show_default=True, help="To listen on.")


@click.command()
@click.argument("out")
@_host
@click.option("--port", default=8001, show_default=True)
@_router
@click.option("--largest-body", default=1 << 20, show_default=True, help="Of a request, in bytes.")
@click.option(
    "--most-at-once", default=64, show_default=True, help="Requests; more are to try again."
)
def classify(
    out: str, host: str, port: int, router: RouterName, largest_body: int, most_at_once: int
) -> None:
    """Serve the probabilities of the experts of the artifact in OUT for each text.

    POST /classify {"inputs": text or texts}; /health, /ready and /metrics; MCP tools at /mcp.

    Example: mergekit-mediator classify OUT --port 8001
    """
    apps = _apps("classifier")
    manifest, decider = _opened(out, router)
    app = apps.classifier_app(decider, manifest.expert_names, largest_body, most_at_once)
    _serve(app, host, port)


@click.command()
@click.argument("out")
@click.option("--upstream", "urls", multiple=True, required=True, help="URL of an engine; repeat.")
@_host
@click.option("--port", default=8000, show_default=True)
@click.option(
    "--adapter-name",
    "template",
    default="{expert}",
    show_default=True,
    help="How engines name an adapter; {base}:{expert} for SGLang.",
)
@click.option(
    "--affinity",
    type=click.Choice(["conversation", "adapter"]),
    default="conversation",
    show_default=True,
    help="What stays on one engine; adapter for more experts than an engine's slots.",
)
def gateway(
    out: str, urls: tuple[str, ...], host: str, port: int, template: str, affinity: str
) -> None:
    """Route requests to engines that hold the exported experts of the artifact in OUT.

    Settings are environment variables, such as MEDIATOR_POLICY=hard. UPSTREAM_API_KEY is the key with which
    engines are asked for their models.

    Example: mergekit-mediator gateway OUT --upstream http://one:8000 --upstream http://two:8000
    """
    apps = _apps("gateway")
    settings = ServiceSettings.from_environment()
    manifest, decider = _opened(out, settings.router)
    key = os.environ.get("UPSTREAM_API_KEY")
    app = apps.gateway_app(manifest.expert_names, decider, settings, urls, template, key, affinity)
    _serve(app, host, port)


def _apps(name: str) -> ModuleType:
    """A module of applications.

    Raises:
        EngineError: a package that it needs is not installed.
    """
    try:
        return import_module(f"mergekit_mediator.engines.{name}")
    except ModuleNotFoundError as error:
        raise EngineError(
            f"{error.name}: not installed: run `pip install 'mergekit-mediator[gateway]'`"
        ) from error


def _opened(out: str, router: RouterName) -> tuple[Manifest, Decider]:
    """The manifest of a verified artifact, and its router."""
    root = local_directory(out, None)
    manifest = read_manifest(root)
    verify_files(root, manifest)
    decider = choose_decider(root, manifest, router)
    click.echo(f"experts {', '.join(manifest.expert_names)}; routed by {decider.name}", err=True)
    return manifest, decider


def _serve(app: Any, host: str, port: int) -> None:
    """Serve until a signal ends it; requests that are running are answered first."""
    import uvicorn

    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=30)
