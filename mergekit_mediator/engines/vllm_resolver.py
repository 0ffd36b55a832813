"""A LoRA resolver of vLLM: it finds the adapter of an expert, a blend or `dense` when a request first names it.

    VLLM_PLUGINS=mediator_resolver VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve OUT --enable-lora

vLLM tells a resolver the name in a request and not the prompt, so a resolver cannot route. It is for versions of vLLM
that the plugin does not know.
"""

import asyncio
import logging
from pathlib import Path
from typing import Any

from mergekit_mediator.engines.adapter_store import AdapterStore, open_store
from mergekit_mediator.engines.names import AUTO, adapter_id, parse
from mergekit_mediator.engines.settings import ServiceSettings
from mergekit_mediator.engines.start import ends_server
from mergekit_mediator.errors import EngineError, MediatorError

NAME = "mediator_resolver"
# The default of vLLM's --max-lora-rank. vLLM does not tell a resolver its rank.
_RANK = 16
_LOG = logging.getLogger("vllm.mediator")


def register() -> None:
    """Register the resolver, if `VLLM_PLUGINS` names it; vLLM calls this in each of its processes.

    If the settings are wrong, the server ends with one line and status 1.
    """
    from vllm import envs
    from vllm.lora.resolver import LoRAResolverRegistry

    if NAME not in (envs.VLLM_PLUGINS or ()):
        return  # vLLM loads plugins of this group in every server whose VLLM_PLUGINS is not set
    with ends_server():
        if not envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
            raise EngineError(
                f"{NAME}: vLLM asks no resolver: set VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
            )
        LoRAResolverRegistry.register_resolver(
            NAME, ResolveExperts(ServiceSettings.from_environment())
        )


class ResolveExperts:
    """The resolver. It has the method that vLLM's `LoRAResolver` asks for, and needs no vLLM to be tested.

    vLLM keeps the adapters that it was given. So that no client fills memory, at most `settings.blends` names of
    blends are ever resolved.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        """Start without an artifact; the first request opens it.

        Args:
            settings: the service's settings; those about routing mean nothing here.
        """
        self._settings = settings
        self._store: AdapterStore | None = None
        self._blends: set[str] = set()
        self._lock = asyncio.Lock()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """Find the adapter of a name.

        Args:
            base_model_name: the model that the engine serves.
            lora_name: the name in a request.

        Returns:
            vLLM's `LoRARequest`; None if the name is not ours, or has no adapter for a reason that is logged.
        """
        from vllm.lora.request import LoRARequest

        try:
            async with self._lock:
                path = await asyncio.to_thread(self.path, base_model_name, lora_name)
        except MediatorError as error:
            _LOG.error("%s: %s", lora_name, error)
            return None
        if path is None or self._store is None:
            return None
        return LoRARequest(lora_name, adapter_id(self._store.digest, lora_name), str(path))

    def path(self, served: str, name: str) -> Path | None:
        """Return the folder of a name's adapter, and write the adapter first if it is not on disk.

        Args:
            served: the model that the engine serves.
            name: the name in a request.

        Returns:
            The folder; None if the name is neither an expert, nor `dense`, nor a blend.

        Raises:
            EngineError: the name is `auto`, or one blend more than may be resolved.
            MixtureError: the name is a blend with an unknown expert or a wrong weight.
            MediatorError: the model is no artifact, or the adapter cannot be written.
        """
        if name == AUTO:
            raise EngineError(
                "a resolver knows the name and not the prompt, and cannot route: serve with "
                "VLLM_PLUGINS=mediator, or with the middleware"
            )
        if self._store is None:
            rank = self._settings.rank or _RANK
            self._store = open_store(self._settings, served, None, rank)
        mixture = parse(name, self._store.names, self._settings.grid)
        if mixture is None:
            return None
        if "=" in name and name not in self._blends:
            if len(self._blends) >= self._settings.blends:
                raise EngineError(
                    f"at most {self._settings.blends} names of blends are resolved (MEDIATOR_BLENDS): name "
                    "one of the first, or an expert"
                )
            self._blends.add(name)
        return self._store.path(mixture)
