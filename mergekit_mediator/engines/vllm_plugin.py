"""The vLLM plugin: `VLLM_PLUGINS=mediator vllm serve OUT --enable-lora` answers as experts, blends and `auto`.

vLLM's API server calls `attach_router` and then `init_state`. The engine gets the experts' adapters at the start,
and a blend's adapter with the first request for it. Routing runs behind vLLM's authentication. The plugin needs
vLLM 0.32, because the lists of adapters and of models are internals of vLLM.
"""

import asyncio
import logging
import sys
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from mergekit_mediator.engines.adapter_store import AdapterStore
from mergekit_mediator.engines.deciders import choose_decider
from mergekit_mediator.engines.middleware import RouteRequests, Scope
from mergekit_mediator.engines.names import AUTO, adapter_id, check_names, name_of
from mergekit_mediator.engines.service import Service
from mergekit_mediator.engines.settings import ServiceSettings
from mergekit_mediator.errors import EngineError, MediatorError, first_line
from mergekit_mediator.serve.mixture import DENSE, Mixture
from mergekit_mediator.share.pull import fetch_artifact

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import State

VERSIONS = (0, 32)
# The disk holds the blends of this many servers that share the cache.
_SERVERS_OF_A_MACHINE = 4
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
        try:
            state.mediator = await start(engine_client, state)
        except MediatorError as error:
            print(f"mergekit-mediator: {error}", file=sys.stderr, flush=True)
            raise SystemExit(1) from error


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
    root, manifest = await asyncio.to_thread(fetch_artifact, config.model, config.revision)
    check_names(manifest.expert_names)
    most_blends = _SERVERS_OF_A_MACHINE * settings.blends
    store = AdapterStore(root, _rank(settings, lora.max_lora_rank), settings.cache, most_blends)
    adapters = EngineAdapters(engine_client, state.openai_serving_models, store)
    for name in store.names:
        await adapters.add(Mixture.of(name, store.names))
        if loss := store.lost(name):
            _LOG.warning("expert %s: %s", name, loss)
    await adapters.add(DENSE)
    decider = await asyncio.to_thread(choose_decider, root, manifest, settings.router)
    _LOG.info("experts %s; routed by %s", ", ".join(store.names), decider.name)
    return Service(store.names, decider, adapters, settings)


class EngineAdapters:
    """The adapters of a vLLM engine."""

    def __init__(self, engine_client: Any, models: Any, store: AdapterStore) -> None:
        """Start without adapters.

        Args:
            engine_client: vLLM's client of the engine.
            models: vLLM's `OpenAIServingModels`, which lists the adapters that requests may name.
            store: writes the adapters.
        """
        self._engine, self._models, self._store = engine_client, models, store
        self.dense_is_adapter = _is_cpu()
        self._lock = asyncio.Lock()

    async def add(self, mixture: Mixture) -> None:
        """Load a mixture's adapter into the engine, once.

        Raises:
            ArtifactError: an expert's file cannot be read.
            ExportError: the adapter cannot be written.
            EngineError: the engine refuses the adapter.
        """
        from vllm.lora.request import LoRARequest

        name = name_of(mixture)
        if mixture.is_dense and not self.dense_is_adapter:
            return
        if name in self._models.lora_requests and self._store.has(mixture):
            return
        async with self._lock:
            # Another server may have deleted the files, and the engine reads them again when it needs them.
            path = await asyncio.to_thread(self._store.path, mixture)
            if name in self._models.lora_requests:
                return
            request = LoRARequest(name, adapter_id(self._store.digest, name), str(path))
            try:
                await self._engine.add_lora(request)
            except Exception as error:  # vLLM raises no narrower type
                raise EngineError(
                    f"{path}: vLLM refuses the adapter: {first_line(error)}"
                ) from error
            self._models.lora_requests[name] = request

    def engine_name(self, mixture: Mixture) -> str:
        """Return the model name by which the engine knows a mixture.

        On CPUs, an adapter answers the requests without an adapter in a mixed batch (vLLM #48421). There the
        dense expert has an adapter too, which changes nothing.
        """
        if mixture.is_dense and not self.dense_is_adapter:
            return str(self._models.base_model_paths[0].name)
        return name_of(mixture)

    @property
    def dense_names(self) -> frozenset[str]:
        """The engine's own names of the dense expert."""
        return frozenset(path.name for path in self._models.base_model_paths)

    async def remove(self, mixture: Mixture) -> None:
        """Remove a blend's adapter from the engine.

        Raises:
            EngineError: the engine fails.
        """
        name = name_of(mixture)
        request = self._models.lora_requests.pop(name, None)
        if request is None:
            return
        try:
            await self._engine.remove_lora(request.lora_int_id)
        except Exception as error:  # vLLM raises no narrower type
            raise EngineError(f"{name}: vLLM cannot remove it: {first_line(error)}") from error


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


def _is_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _check_version() -> None:
    import vllm

    if tuple(vllm.__version_tuple__[:2]) != VERSIONS:
        version = ".".join(map(str, VERSIONS))
        raise EngineError(
            f"vLLM {version} required, got {vllm.__version__}: install vllm=={version}.*, or serve with "
            "`mergekit-mediator gateway`"
        )
