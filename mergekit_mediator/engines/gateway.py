"""An OpenAI-compatible front for engines without a plugin: it routes a request, names its adapter, forwards it.

A gateway remembers no conversation, so several gateways may serve the same engines. If an engine fails before
the first byte of its answer, another engine answers. If it fails later, the client sees the break.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Literal

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest

from mergekit_mediator.engines.bodies import LARGEST_BODY, json_object, read_body
from mergekit_mediator.engines.conversation import routables
from mergekit_mediator.engines.deciders import Decider
from mergekit_mediator.engines.forward import forward_request
from mergekit_mediator.engines.middleware import RouteRequests, Scope
from mergekit_mediator.engines.names import AUTO, check_names, name_of
from mergekit_mediator.engines.replicas import Replicas
from mergekit_mediator.engines.service import RequestError, Service
from mergekit_mediator.engines.settings import ServiceSettings
from mergekit_mediator.errors import EngineError, PromptError
from mergekit_mediator.serve.mixture import DENSE_NAME, Mixture

Affinity = Literal["conversation", "adapter"]
_SECONDS_BETWEEN_QUESTIONS = 5.0


class NamedAdapters:
    """The adapters of engines by name: engines hold the experts' adapters; engines with the plugin make blends."""

    def __init__(self, replicas: Replicas, template: str) -> None:
        """Name adapters by a template.

        Args:
            replicas: the engines.
            template: the engines' name of an expert's adapter, such as `{expert}` or `{base}:{expert}`.
        """
        self._replicas, self._template = replicas, template

    async def add(self, mixture: Mixture) -> None:
        """Refuse a blend that no engine makes.

        Raises:
            EngineError: the mixture is a blend, and no engine makes blends.
        """
        is_blend = not mixture.is_dense and not mixture.alone
        if is_blend and not any(replica.blends for replica in self._replicas.alive):
            raise EngineError(
                f"{name_of(mixture)}: no engine makes blends: name one expert, or serve with the vLLM plugin"
            )

    async def remove(self, mixture: Mixture) -> None:
        """Do nothing: engines remove blends themselves."""

    def engine_name(self, mixture: Mixture) -> str:
        """Return the model name by which the engines know a mixture."""
        base = self._replicas.base or DENSE_NAME
        if mixture.is_dense:
            return DENSE_NAME if DENSE_NAME in self._replicas.models else base
        if mixture.alone:
            return self._template.format(expert=mixture.alone, base=base)
        return name_of(mixture)

    @property
    def dense_names(self) -> frozenset[str]:
        """The engines' names of their own model."""
        return frozenset(replica.base for replica in self._replicas.all if replica.base)


def gateway_app(
    experts: tuple[str, ...],
    decider: Decider,
    settings: ServiceSettings,
    urls: tuple[str, ...],
    template: str = "{expert}",
    key: str | None = None,
    affinity: Affinity = "conversation",
) -> FastAPI:
    """Make the gateway's ASGI application, which closes the router when it shuts down.

    Args:
        experts: the artifact's experts, in its order.
        decider: routes prompts.
        settings: the service's settings.
        urls: the addresses of the engines.
        template: the engines' name of an expert's adapter.
        key: the API key for the engines' lists of models; requests bring their own key.
        affinity: one engine gets all turns of a `conversation`, or all requests of an `adapter`, which suits
            more experts than an engine has slots; a much busier engine passes requests to others.

    Raises:
        EngineError: an expert's name means something else on engines, the template names no expert, or an
            address is no HTTP address.
        MixtureError: the fallback is no expert.
        SettingError: the settings need another router.
    """
    check_names(experts)
    _check_template(template)
    limits = httpx.Limits(max_connections=None)  # engines bound the number of requests themselves
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
        try:
            if ".." in path.split("/"):  # engines protect paths below /v1 alone by their API key
                raise RequestError("the path leads out of /v1", 404, "NotFoundError")
            body = await read_body(request.receive, LARGEST_BODY)
            if body is None:
                limit = f"a body of at most {LARGEST_BODY >> 20} MiB is required, got a larger one"
                raise RequestError(limit, 413, "BadRequestError")
            model, conversation = _about(body)
            order = replicas.order(model, model if affinity == "adapter" else conversation)
            response = await forward_request(client, order, request, path, body, retries)
        except RequestError as error:
            response = JSONResponse(error.body(), error.status)
        requests.labels(str(response.status_code)).inc()
        return response

    async def service_of(_: Scope) -> Service:
        return service

    app.add_middleware(RouteRequests, service=service_of)
    return app


def _about(body: bytes) -> tuple[str, str]:
    """Return the model of a request, and a digest that all turns of its conversation share.

    A request that has no opening shares its digest with equal requests.
    """
    model, opening = "", body
    with suppress(PromptError):
        fields = json_object(body)
        model = str(fields.get("model", ""))
        opening = repr(routables(fields)[0]).encode()
    return model, hashlib.sha256(opening).hexdigest()


def _check_template(template: str) -> None:
    """Refuse a template that gives every expert the same name.

    Raises:
        EngineError: the template lacks `{expert}`, or has another field than `{expert}` and `{base}`.
    """
    try:
        names = {template.format(expert=expert, base="base") for expert in "ab"}
    except (KeyError, IndexError, ValueError) as error:
        raise EngineError(
            f"adapter name {template!r}: the fields {{expert}} and {{base}} are allowed, no others: use for "
            "example {base}:{expert}"
        ) from error
    if len(names) == 1:
        raise EngineError(
            f"adapter name {template!r}: {{expert}} is required: use for example {{base}}:{{expert}}"
        )
