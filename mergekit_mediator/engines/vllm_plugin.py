"""The vLLM plugin: `VLLM_PLUGINS=mediator vllm serve OUT --enable-lora` answers as experts, blends and `auto`.

vLLM's API server calls `attach_router` and then `init_state`. The engine gets the experts' adapters at the start,
and a blend's adapter with the first request for it. Routing runs behind vLLM's authentication. The plugin needs
vLLM 0.32, because the lists of adapters and of models are internals of vLLM.
"""

import asyncio
import logging
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from mergekit_mediator.engines.adapter_store import open_store
from mergekit_mediator.engines.deciders import choose_decider
from mergekit_mediator.engines.middleware import RouteRequests, Scope
from mergekit_mediator.engines.names import AUTO
from mergekit_mediator.engines.service import Service
from mergekit_mediator.engines.settings import ServiceSettings
from mergekit_mediator.engines.start import ends_server
from mergekit_mediator.engines.vllm_adapters import EngineAdapters
from mergekit_mediator.errors import EngineError
from mergekit_mediator.serve.mixture import DENSE, Mixture

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import State

VERSIONS = (0, 32)
_LOG = logging.getLogger("vllm.mediator")


class Plugin:
    """The plugin of vLLM's entry point `vllm.endpoint_plugins`."""

    name = "mediator"
    required_tasks = ("generate",)

    def attach_router(self, app: "FastAPI") -> None:
        """Route requests before vLLM's own routes see them, and list `auto` among the models."""
        from fastapi import Request
        from fastapi.responses import JSONResponse

        app.add_middleware(RouteRequests, service=_service_of)

        @app.get("/v1/models")
        async def models(request: Request) -> JSONResponse:
            listed = await request.app.state.openai_serving_models.show_available_models()
            content = listed.model_dump()
            content["data"].append({**content["data"][0], "id": AUTO})
            return JSONResponse(content)

    async def init_state(self, engine_client: Any, state: "State", args: Namespace) -> None:
        """Load the artifact's experts into the engine.

        If the artifact or the engine does not fit, the server ends with one line and status 1.
        """
        with ends_server():
            state.mediator = await start(engine_client, state)


async def start(engine_client: Any, state: "State") -> Service:
    """Start the service of a vLLM server whose model is an artifact.

    Raises:
        EngineError: the plugin does not know this version of vLLM, or the engine allows no adapters.
        MediatorError: the artifact cannot be served.
    """
    _check_version()
    lora = engine_client.vllm_config.lora_config
    if lora is None:
        raise EngineError("the engine allows no adapters: start vLLM with --enable-lora")
    config = engine_client.model_config
    settings = ServiceSettings.from_environment()
    rank = _rank(settings, lora.max_lora_rank)
    embeddings = await asyncio.to_thread(_takes_embeddings, config)
    store = await asyncio.to_thread(
        open_store, settings, config.model, config.revision, rank, embeddings
    )
    adapters = EngineAdapters(engine_client, state.openai_serving_models, store)
    for name in store.names:
        await adapters.add(Mixture.of(name, store.names))
        if loss := store.lost(name):
            _LOG.warning("expert %s: %s", name, loss)
    await adapters.add(DENSE)
    decider = await asyncio.to_thread(choose_decider, store.root, store.manifest, settings.router)
    _LOG.info("experts %s; routed by %s", ", ".join(store.names), decider.name)
    return Service(store.names, decider, adapters, settings)


async def _service_of(scope: Scope) -> Service | None:
    """Return the service of a vLLM server; None while the server starts."""
    return getattr(scope["app"].state, "mediator", None)


def _rank(settings: ServiceSettings, largest: int) -> int:
    """Return the rank of the exported adapters.

    Raises:
        EngineError: the engine does not allow the rank.
    """
    rank = settings.rank or largest
    if rank > largest:
        raise EngineError(
            f"MEDIATOR_RANK: at most {largest} is required, the engine's largest rank, got {rank}: "
            f"start vLLM with --max-lora-rank {rank}"
        )
    return rank


def _takes_embeddings(config: Any) -> bool:
    """Tell whether vLLM's class of a model takes adapters of the embedding and the head; that of Qwen2 does not."""
    from vllm.model_executor.model_loader.utils import get_model_cls

    return bool(getattr(get_model_cls(config), "embedding_modules", None))


def _check_version() -> None:
    import vllm

    if tuple(vllm.__version_tuple__[:2]) != VERSIONS:
        version = ".".join(map(str, VERSIONS))
        raise EngineError(
            f"vLLM {version} required, got {vllm.__version__}: install vllm=={version}.*, or serve with "
            "`mergekit-mediator gateway`"
        )
