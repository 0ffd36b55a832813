"""The adapters of a running vLLM engine. Its lists of adapters and of models are internals of vLLM 0.32."""

import asyncio
from typing import Any

from mergekit_mediator.engines.adapter_store import AdapterStore
from mergekit_mediator.engines.names import adapter_id, name_of
from mergekit_mediator.errors import EngineError, first_line
from mergekit_mediator.serve.mixture import Mixture


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


def _is_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())
