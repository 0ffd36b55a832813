"""The commands `classify` and `gateway`, which serve over HTTP."""

import os
from importlib import import_module
from types import ModuleType
from typing import Any

import click

from mergekit_mediator.engines.deciders import Decider, choose_decider
from mergekit_mediator.engines.settings import RouterName, ServiceSettings
from mergekit_mediator.errors import EngineError
from mergekit_mediator.share.pull import fetch_artifact
from mergekit_mediator.store.manifest import Manifest

_router = click.option(
    "--router",
    type=click.Choice(["auto", "embedding", "hidden", "response", "likelihood"]),
    default="auto",
    show_default=True,
    help="The router; auto is embedding if OUT is calibrated for it, else the best that OUT has.",
)
_host = click.option(
    "--host", default="127.0.0.1", show_default=True, help="The address that the server listens on."
)


@click.command()
@click.argument("out")
@_host
@click.option(
    "--port", default=8001, show_default=True, help="The port that the server listens on."
)
@_router
@click.option(
    "--largest-body", default=1 << 20, show_default=True, help="The most bytes of a request's body."
)
@click.option(
    "--most-at-once",
    default=64,
    show_default=True,
    help="The most requests that are answered at once; a further one must try again.",
)
def classify(
    out: str, host: str, port: int, router: RouterName, largest_body: int, most_at_once: int
) -> None:
    """Serve for each text the probability of every expert of the artifact in OUT.

    OUT is a directory, or a repository on the Hub. Clients POST {"inputs": text or texts} to /classify, GET
    /health, /ready and /metrics, or call the MCP tools at /mcp.

    Example: mergekit-mediator classify OUT --port 8001
    """
    apps = _apps("classifier")
    manifest, decider = _opened(out, router)
    app = apps.classifier_app(decider, manifest.expert_names, largest_body, most_at_once)
    _serve(app, host, port)


@click.command()
@click.argument("out")
@click.option(
    "--upstream",
    "urls",
    multiple=True,
    required=True,
    help="The address of an engine; name every engine with an option of its own.",
)
@_host
@click.option(
    "--port", default=8000, show_default=True, help="The port that the server listens on."
)
@click.option(
    "--adapter-name",
    "template",
    default="{expert}",
    show_default=True,
    help="The engines' name of an expert's adapter; SGLang needs {base}:{expert}.",
)
@click.option(
    "--affinity",
    type=click.Choice(["conversation", "adapter"]),
    default="conversation",
    show_default=True,
    help="One engine gets all turns of a conversation, or all requests of an adapter, which suits more "
    "experts than an engine has slots.",
)
def gateway(
    out: str, urls: tuple[str, ...], host: str, port: int, template: str, affinity: str
) -> None:
    """Route requests to engines that serve the experts of the artifact in OUT as adapters.

    OUT is a directory, or a repository on the Hub. Environment variables hold the settings, such as
    MEDIATOR_POLICY=hard. UPSTREAM_API_KEY is the API key for the engines' lists of models; requests bring their
    own key.

    Example: mergekit-mediator gateway OUT --upstream http://one:8000 --upstream http://two:8000
    """
    apps = _apps("gateway")
    settings = ServiceSettings.from_environment()
    manifest, decider = _opened(out, settings.router)
    key = os.environ.get("UPSTREAM_API_KEY")
    app = apps.gateway_app(manifest.expert_names, decider, settings, urls, template, key, affinity)
    _serve(app, host, port)


def _apps(name: str) -> ModuleType:
    """Import the module of an application.

    Raises:
        EngineError: the module needs a package that is not installed.
    """
    try:
        return import_module(f"mergekit_mediator.engines.{name}")
    except ModuleNotFoundError as error:
        raise EngineError(
            f"the package {error.name} is required and not installed: run `pip install 'mergekit-mediator[gateway]'`"
        ) from error


def _opened(out: str, router: RouterName) -> tuple[Manifest, Decider]:
    """Verify an artifact; return its manifest and its router."""
    root, manifest = fetch_artifact(out)
    decider = choose_decider(root, manifest, router)
    click.echo(f"experts {', '.join(manifest.expert_names)}; routed by {decider.name}", err=True)
    return manifest, decider


def _serve(app: Any, host: str, port: int) -> None:
    """Serve until a signal ends the process; requests in flight are answered first, for at most 30 seconds."""
    import uvicorn

    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=30)
