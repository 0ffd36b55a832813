"""An OpenAI-compatible front for engines that take no plugin: it routes, names the adapter and forwards.

Nothing is kept between requests, so any number of gateways may stand beside each other. An engine that fails
before the first byte of its answer is replaced by another one; after that, the client sees the break.
"""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Literal

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest

from mergekit_mediator.engines.conversation import routables
from mergekit_mediator.engines.deciders import Decider
from mergekit_mediator.engines.middleware import RouteRequests, Scope
from mergekit_mediator.engines.names import AUTO, check_names, name_of
from mergekit_mediator.engines.replicas import Replica, Replicas
from mergekit_mediator.engines.service import RequestError, Service
from mergekit_mediator.engines.settings import ServiceSettings
from mergekit_mediator.errors import EngineError, PromptError
from mergekit_mediator.serve.mixture import DENSE_NAME, Mixture

Affinity = Literal["conversation", "adapter"]
# Headers that belong to one connection, and those that the HTTP libraries write themselves.
_HOP = {"connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer"}
_OURS = {"host", "content-length", "accept-encoding", "content-encoding", "date", "server"}
_AWAY = {502, 503, 504}  # what proxies and starting engines answer
_SECONDS_BETWEEN_QUESTIONS = 5.0


class NamedAdapters:
    """Adapters by their names: engines hold those of experts, and those with the plugin make blends."""

    def __init__(self, replicas: Replicas, template: str) -> None:
        """Args:
        replicas: the engines.
        template: how they name an expert's adapter, such as `{expert}` or `{base}:{expert}`.
        """
        self._replicas, self._template = replicas, template

    async def add(self, mixture: Mixture) -> None:
        """Refuse what no engine can answer as.

        Raises:
            EngineError: a blend, and no engine makes blends.
        """
        is_blend = not mixture.is_dense and not mixture.alone
        if is_blend and not any(replica.blends for replica in self._replicas.alive):
            raise EngineError(
                f"{name_of(mixture)}: no engine makes blends: name one expert, or serve with the vLLM plugin"
            )

    async def remove(self, mixture: Mixture) -> None:
        """Leave the engines as they are: they let blends go themselves."""

    def engine_name(self, mixture: Mixture) -> str:
        """The name that the engines have for a mixture."""
        base = self._replicas.base or DENSE_NAME
        if mixture.is_dense:
            return DENSE_NAME if DENSE_NAME in self._replicas.models else base
        if mixture.alone:
            return self._template.format(expert=mixture.alone, base=base)
        return name_of(mixture)

    @property
    def dense_names(self) -> frozenset[str]:
        """The engines' names of their own model."""
        return frozenset(r.base for r in self._replicas.all if r.base)


def gateway_app(
    experts: tuple[str, ...],
    decider: Decider,
    settings: ServiceSettings,
    urls: tuple[str, ...],
    template: str = "{expert}",
    key: str | None = None,
    affinity: Affinity = "conversation",
) -> FastAPI:
    """The gateway as an ASGI application.

    Args:
        experts: of the artifact.
        decider: routes prompts.
        settings: of the service.
        urls: of the engines.
        template: how engines name an expert's adapter.
        key: for asking engines for their models; requests bring their own.
        affinity: what stays on one engine as long as that is not much busier than others: the turns of a
            `conversation`, or all requests of an `adapter`, for more experts than an engine's slots.

    Raises:
        EngineError: an expert whose name means something else here, or a template that names no expert.
    """
    check_names(experts)
    _check_template(template)
    limits = httpx.Limits(max_connections=None)  # engines bound what they take
    client = httpx.AsyncClient(timeout=httpx.Timeout(None, connect=5.0), limits=limits)
    replicas = Replicas(urls, client, key)
    service = Service(experts, decider, NamedAdapters(replicas, template), settings)
    registry = CollectorRegistry()
    requests = Counter(
        "mediator_gateway_requests", "Answers by status.", ["status"], registry=registry
    )
    retries = Counter(
        "mediator_gateway_retries", "Requests sent again to another engine.", registry=registry
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await replicas.ask()
        asking = asyncio.create_task(replicas.ask_forever(_SECONDS_BETWEEN_QUESTIONS))
        yield
        asking.cancel()
        await client.aclose()
        decider.close()

    app = FastAPI(title="mergekit-mediator gateway", lifespan=lifespan)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        alive = [replica.url for replica in replicas.alive]
        content = {"alive": alive, "router": decider.name}
        return JSONResponse(content, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> Response:
        names = dict.fromkeys([*replicas.models, *experts, AUTO])
        cards = [{"id": n, "object": "model", "created": 0, "owned_by": "mediator"} for n in names]
        return JSONResponse({"object": "list", "data": cards})

    @app.post("/v1/{path:path}")
    async def forward(request: Request, path: str) -> Response:
        body = await request.body()
        try:
            model, conversation = _about(body)
            stays = model if affinity == "adapter" else conversation
            order = replicas.order(model, stays)
            response = await _forwarded(client, order, request, path, body, retries)
        except RequestError as error:
            response = JSONResponse(error.body(), error.status)
        requests.labels(str(response.status_code)).inc()
        return response

    async def service_of(_: Scope) -> Service:
        return service

    app.add_middleware(RouteRequests, service=service_of)
    return app


async def _forwarded(
    client: httpx.AsyncClient,
    order: list[Replica],
    request: Request,
    path: str,
    body: bytes,
    retries: Counter,
) -> Response:
    """The answer of the first engine that begins one.

    Raises:
        RequestError: no engine answers.
    """
    headers = _passed(request.headers)
    reason = "no engine is there"
    for attempt, replica in enumerate(order):
        if attempt:
            retries.inc()
        query = f"?{request.url.query}" if request.url.query else ""
        url = f"{replica.url}/v1/{path}{query}"
        asked = client.build_request("POST", url, headers=headers, content=body)
        with replica.answering():  # until its answer begins; a stream counts itself
            try:
                answer = await client.send(asked, stream=True)
                if answer.status_code in _AWAY:
                    await answer.aread()
                    await answer.aclose()
                    reason = f"{replica.url} answers with status {answer.status_code}"
                    continue
                return await _begun(answer, replica)
            except httpx.TransportError as error:
                replica.alive = False
                reason = f"{replica.url}: {type(error).__name__}: {error}"
    raise RequestError(f"no engine answers: {reason}", 503, "ServiceUnavailableError")


async def _begun(answer: httpx.Response, replica: Replica) -> Response:
    """An answer whose first bytes are there; one that is no stream is whole.

    Raises:
        httpx.TransportError: the engine failed before.
    """
    headers = _passed(answer.headers)
    if not answer.headers.get("content-type", "").startswith("text/event-stream"):
        content = await answer.aread()
        await answer.aclose()
        return Response(content, answer.status_code, headers)
    parts = answer.aiter_bytes()
    first = await anext(parts, b"")

    async def stream() -> AsyncIterator[bytes]:
        with replica.answering():
            try:
                yield first
                async for part in parts:
                    yield part
            finally:
                await answer.aclose()

    return StreamingResponse(stream(), answer.status_code, headers)


def _about(body: bytes) -> tuple[str, str]:
    """The model of a request, and a digest of what the turns of its conversation have in common."""
    try:
        fields: Any = json.loads(body)
        model = str(fields.get("model", ""))
        opening = routables(fields)[0]
    except (ValueError, AttributeError, PromptError):
        return "", ""
    return model, hashlib.sha256(repr(opening).encode()).hexdigest()


def _passed(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers that go on to the other side."""
    return {k: v for k, v in headers.items() if k.lower() not in _HOP | _OURS}


def _check_template(template: str) -> None:
    try:
        names = {template.format(expert=expert, base="base") for expert in "ab"}
    except (KeyError, IndexError, ValueError) as error:
        raise EngineError(f"{template!r}: only {{expert}} and {{base}} may be named") from error
    if len(names) == 1:
        raise EngineError(f"{template!r}: {{expert}} required, such as {{base}}:{{expert}}")
