"""A service that tells which expert a text needs: for semantic routers, gateways and other languages.

`POST /classify {"inputs": text}` returns `[{"label", "score"}, ...]` with all experts, whose scores sum to 1; a
list of texts returns a list of such lists. vllm-project/semantic-router reads this form from external classifiers
(`http_classify`, contract `label_distribution.v1`). Its MCP classification calls the tools at `/mcp`.
"""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from mcp.server import MCPServer
from mcp.server.transport_security import TransportSecuritySettings
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
)

from mergekit_mediator.engines.bodies import json_object, read_body
from mergekit_mediator.engines.conversation import routables
from mergekit_mediator.engines.deciders import Decider
from mergekit_mediator.errors import EngineError, PromptError, RoutingError
from mergekit_mediator.route.decision import RoutingDecision

# The most texts of a request: one request must not keep the router from the others for long.
_MOST_TEXTS = 256


def classifier_app(
    decider: Decider, experts: tuple[str, ...], largest_body: int = 1 << 20, most_at_once: int = 64
) -> FastAPI:
    """Make the service's ASGI application, which closes the router when it shuts down.

    Args:
        decider: routes texts.
        experts: the artifact's experts, in its order.
        largest_body: the most bytes of a request's body; a larger body gets status 413.
        most_at_once: the most requests that are answered at once; a further request gets status 503 and may
            try again.
    """
    tools = _tools(decider, experts)
    anywhere = TransportSecuritySettings(enable_dns_rebinding_protection=False)
    mcp_app = tools.streamable_http_app(
        json_response=True, stateless_http=True, transport_security=anywhere
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with tools.session_manager.run():
            yield
        decider.close()

    app = FastAPI(title="mergekit-mediator classify", lifespan=lifespan)
    registry = CollectorRegistry()
    requests = Counter(
        "mediator_classify_requests", "Requests by status.", ["status"], registry=registry
    )
    seconds = Histogram("mediator_classify_seconds", "Time of an answer.", registry=registry)
    in_flight = 0

    async def answer(request: Request) -> JSONResponse:
        body = await read_body(request.receive, largest_body)
        if body is None:
            message = f"a body of at most {largest_body} bytes is required, got a larger one"
            return JSONResponse({"error": message}, 413)
        try:
            inputs = _inputs(body)
            texts = [inputs] if isinstance(inputs, str) else inputs
            rows = distributions(await _decide(decider, texts))
        except (PromptError, RoutingError) as error:
            return JSONResponse({"error": str(error)}, 400)
        except EngineError as error:
            return JSONResponse({"error": str(error)}, 503)
        return JSONResponse(rows[0] if isinstance(inputs, str) else rows)

    @app.post("/classify")
    async def classify(request: Request) -> Response:
        nonlocal in_flight
        if in_flight >= most_at_once:
            requests.labels("503").inc()
            message = f"{in_flight} requests are being answered: try again"
            return JSONResponse({"error": message}, 503, {"retry-after": "1"})
        in_flight += 1
        try:
            with seconds.time():
                response = await answer(request)
        finally:
            in_flight -= 1
        requests.labels(str(response.status_code)).inc()
        return response

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        """Route a text, because a router whose process has ended is not ready."""
        began = time.perf_counter()
        try:
            await _decide(decider, ["ready?"])
        except EngineError as error:
            return JSONResponse({"error": str(error)}, 503)
        milliseconds = round(1000 * (time.perf_counter() - began), 2)
        return JSONResponse(
            {"status": "ready", "router": decider.name, "milliseconds": milliseconds}
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    app.mount("/", mcp_app)
    return app


def distributions(decision: RoutingDecision) -> list[list[dict[str, Any]]]:
    """Return for each text the experts with their probabilities, the likeliest first."""
    rows = []
    for weights in decision.weights.tolist():
        pairs = sorted(zip(decision.experts, weights, strict=True), key=lambda pair: -pair[1])
        rows.append([{"label": name, "score": p} for name, p in pairs])
    return rows


def _tools(decider: Decider, experts: tuple[str, ...]) -> MCPServer:
    """Make the MCP server whose tools semantic-router calls."""
    server = MCPServer("mergekit-mediator")

    @server.tool()
    async def classify_text(text: str) -> dict[str, Any]:
        """Tell which expert a text needs, with all probabilities and their entropy in nats."""
        decision = await _decide(decider, [text])
        weights = dict(zip(decision.experts, decision.weights[0].tolist(), strict=True))
        probabilities = [weights[name] for name in experts]
        confidence = max(probabilities)
        likeliest = probabilities.index(confidence)
        return {
            "class": likeliest,
            "confidence": confidence,
            "model": experts[likeliest],
            "use_reasoning": False,
            "probabilities": probabilities,
            "entropy": float(decision.entropy[0]),
        }

    @server.tool()
    async def list_categories() -> dict[str, Any]:
        """List the experts in the order of `classify_text`'s classes."""
        return {"categories": list(experts)}

    return server


async def _decide(decider: Decider, texts: list[str]) -> RoutingDecision:
    return await decider.decide([routables({"prompt": text})[0] for text in texts], "prompt")


def _inputs(body: bytes) -> str | list[str]:
    """Return the field `inputs`.

    Raises:
        PromptError: the body is no JSON object with a text or a list of texts, or the list is too long.
    """
    inputs = json_object(body).get("inputs")
    if isinstance(inputs, str):
        return inputs
    if not (isinstance(inputs, list) and inputs and all(isinstance(text, str) for text in inputs)):
        raise PromptError('the body: an object {"inputs": text or list of texts} is required')
    if len(inputs) > _MOST_TEXTS:
        raise PromptError(
            f"inputs: at most {_MOST_TEXTS} texts are required, got {len(inputs)}: send several requests"
        )
    return inputs
