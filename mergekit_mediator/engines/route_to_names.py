"""An ASGI middleware for engines that take no plugin: it routes `auto` to the name of an expert's adapter.

    MEDIATOR_ARTIFACT=OUT vllm serve OUT --enable-lora --lora-modules math=adapters/math code=adapters/code
        --middleware mergekit_mediator.engines.route_to_names.RouteToNames

vLLM puts such a middleware outside of its authentication: it reads and routes prompts before a key is checked.
"""

import asyncio

from mergekit_mediator.engines.bodies import Receive
from mergekit_mediator.engines.deciders import Decider, choose_decider
from mergekit_mediator.engines.middleware import App, RouteRequests, Scope, Send
from mergekit_mediator.engines.names import check_names, name_of
from mergekit_mediator.engines.service import Service
from mergekit_mediator.engines.settings import ServiceSettings
from mergekit_mediator.errors import EngineError, MediatorError
from mergekit_mediator.serve.mixture import Mixture
from mergekit_mediator.share.pull import fetch_artifact


class RouteToNames:
    """A middleware that loads the artifact in `MEDIATOR_ARTIFACT` when its server starts, and routes requests.

    If the artifact or a setting does not fit, the server does not start, and says why in one line.
    """

    def __init__(self, app: App) -> None:
        """Wrap an engine's application, and load nothing yet."""
        self._service: Service | None = None
        self._app = RouteRequests(app, self._service_of)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or load and close the router at the start and the end of the server."""
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        try:
            self._service, decider = await asyncio.to_thread(_load)
        except MediatorError as error:
            await receive()
            message = f"mergekit-mediator: {error}"
            await send({"type": "lifespan.startup.failed", "message": message})
            return
        try:
            await self._app(scope, receive, send)
        finally:
            decider.close()

    async def _service_of(self, _: Scope) -> Service | None:
        return self._service


class AdaptersByName:
    """The adapters of an engine that holds those of the experts, each under the expert's name, and makes no blends."""

    # vLLM takes a request without a name for its own model, whatever that is called.
    dense_names: frozenset[str] = frozenset()

    async def add(self, mixture: Mixture) -> None:
        """Refuse a blend.

        Raises:
            EngineError: the mixture is a blend.
        """
        if not mixture.is_dense and not mixture.alone:
            raise EngineError(
                f"{name_of(mixture)}: this engine makes no blends: name one expert, or serve with the vLLM plugin"
            )

    async def remove(self, mixture: Mixture) -> None:
        """Do nothing: there are no blends."""

    def engine_name(self, mixture: Mixture) -> str:
        """Return the name of an expert's adapter, or an empty name for the dense expert."""
        return mixture.alone or ""


def _load() -> tuple[Service, Decider]:
    """Load the artifact's router.

    Raises:
        EngineError: `MEDIATOR_ARTIFACT` is not set, or an expert's name means something else on engines.
        MediatorError: the artifact cannot be served.
    """
    settings = ServiceSettings.from_environment()
    if settings.artifact is None:
        raise EngineError(
            "MEDIATOR_ARTIFACT: the directory or the repository of the artifact is required: set it"
        )
    root, manifest = fetch_artifact(settings.artifact)
    check_names(manifest.expert_names)
    decider = choose_decider(root, manifest, settings.router)
    return Service(manifest.expert_names, decider, AdaptersByName(), settings), decider
