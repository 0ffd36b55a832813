"""The vLLM plugin: `VLLM_PLUGINS=mediator vllm serve OUT --enable-lora` answers as experts, blends and `auto`.

vLLM's API server calls `attach_router` and then `init_state`. Experts are loaded as adapters at the start,
blends when first asked for; requests are routed inside vLLM's authentication. It needs vLLM 0.32: lists of
adapters and of models are its internals.
"""

import asyncio
import logging
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_mediator.engines.adapter_store import AdapterStore
from mergekit_mediator.engines.deciders import choose_decider
from mergekit_mediator.engines.middleware import RouteRequests, Scope
from mergekit_mediator.engines.names import AUTO, adapter_id, check_names, name_of
from mergekit_mediator.engines.service import Service
from mergekit_mediator.engines.settings import ServiceSettings
from mergekit_mediator.errors import EngineError, MediatorError, first_line
from mergekit_mediator.models.loading import local_directory
from mergekit_mediator.serve.mixture import DENSE, Mixture
from mergekit_mediator.store.manifest import read_manifest, verify_files

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import State

VERSIONS = (0, 32)
# Blends stay on disk for this many servers that share the cache.
_SERVERS_OF_A_MACHINE = 4
_LOG = logging.getLogger("vllm.mediator")


class Plugin:
    """What vLLM's entry point `vllm.endpoint_plugins` expects."""

    name = "mediator"
    required_tasks = ("generate",)

    def attach_router(self, app: "FastAPI") -> None:
        """Put the routing of requests before vLLM's own routes, and list `auto` among the models."""
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

        Ends the server with one line and status 1 where the artifact or the engine does not fit.
        """
        try:
            state.mediator = await start(engine_client, state)
        except MediatorError as error:
            print(f"mergekit-mediator: {error}", file=sys.stderr, flush=True)
            raise SystemExit(1) from error


async def start(engine_client: Any, state: "State") -> Service:
    """A service for a vLLM server whose model is an artifact.

    Raises:
        EngineError: a version of vLLM that this plugin does not know, or an engine without adapters.
        MediatorError: the artifact cannot be served.
    """
    _check_version()
    lora = engine_client.vllm_config.lora_config
    if lora is None:
        raise EngineError("the engine takes no adapters: start vLLM with --enable-lora")
    config = engine_client.model_config
    settings = ServiceSettings.from_environment()
    root = await asyncio.to_thread(_root, config.model, config.revision)
    manifest = read_manifest(root)
    check_names(manifest.expert_names)
    most_blends = _SERVERS_OF_A_MACHINE * settings.blends
    store = AdapterStore(root, _rank(settings, lora.max_lora_rank), settings.cache, most_blends)
    adapters = EngineAdapters(engine_client, state.openai_serving_models, store)
    for name in store.names:
        await adapters.add(Mixture.of(name, store.names))
        lost = store.lost(name)
        if lost:
            _LOG.warning("expert %s: %s", name, lost)
    await adapters.add(DENSE)
    decider = await asyncio.to_thread(choose_decider, root, manifest, settings.router)
    _LOG.info("experts %s; routed by %s", ", ".join(store.names), decider.name)
    return Service(store.names, decider, adapters, settings)


class EngineAdapters:
    """The adapters of a vLLM engine."""

    def __init__(self, engine_client: Any, models: Any, store: AdapterStore) -> None:
        """Args:
        engine_client: vLLM's.
        models: vLLM's `OpenAIServingModels`, whose adapters requests may name.
        store: where adapters are written.
        """
        self._engine, self._models, self._store = engine_client, models, store
        self.dense_is_adapter = _is_cpu()
        self._lock = asyncio.Lock()

    async def add(self, mixture: Mixture) -> None:
        """Load a mixture's adapter, once.

        Raises:
            ExportError: the adapter cannot be written.
            EngineError: the engine refuses it.
        """
        from vllm.lora.request import LoRARequest

        name = name_of(mixture)
        if mixture.is_dense and not self.dense_is_adapter:
            return
        if name in self._models.lora_requests and self._store.has(mixture):
            return
        async with self._lock:
            # another server may have deleted the files, which the engine reads again when it needs them
            path = await asyncio.to_thread(self._store.path, mixture)
            if name in self._models.lora_requests:
                return
            request = LoRARequest(name, adapter_id(self._store.digest, name), str(path))
            try:
                await self._engine.add_lora(request)
            except Exception as error:  # the engine sends no other type
                raise EngineError(f"{path}: vLLM refuses it: {first_line(error)}") from error
            self._models.lora_requests[name] = request

    def engine_name(self, mixture: Mixture) -> str:
        """The name that the engine has for a mixture.

        On CPUs, requests without an adapter are answered by one in a mixed batch (vLLM #48421): there the
        dense expert is an adapter, too, which changes nothing.
        """
        if mixture.is_dense and not self.dense_is_adapter:
            return str(self._models.base_model_paths[0].name)
        return name_of(mixture)

    @property
    def dense_names(self) -> frozenset[str]:
        """The engine's own names of the dense expert."""
        return frozenset(path.name for path in self._models.base_model_paths)

    async def remove(self, mixture: Mixture) -> None:
        """Take a blend out of the engine."""
        request = self._models.lora_requests.pop(name_of(mixture), None)
        if request is not None:
            await self._engine.remove_lora(request.lora_int_id)


async def _service_of(scope: Scope) -> Service | None:
    return getattr(scope["app"].state, "mediator", None)


def _root(model: str, revision: str | None) -> Path:
    root = local_directory(model, revision)
    verify_files(root, read_manifest(root))
    return root


def _rank(settings: ServiceSettings, largest: int) -> int:
    """The rank to export experts with.

    Raises:
        EngineError: a rank that the engine does not take.
    """
    rank = settings.rank or largest
    if rank > largest:
        raise EngineError(
            f"MEDIATOR_RANK: at most {largest} required, which the engine was started with, got {rank}: "
            f"start vLLM with --max-lora-rank {rank}"
        )
    return rank


def _is_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _check_version() -> None:
    import vllm

    if tuple(vllm.__version_tuple__[:2]) != VERSIONS:
        known = ".".join(map(str, VERSIONS))
        raise EngineError(
            f"vLLM {known} required, got {vllm.__version__}: install vllm=={known}.*, or serve with "
            "`mergekit-mediator gateway`"
        )
