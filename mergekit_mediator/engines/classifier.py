"""A service that says which expert a text needs: for semantic routers, gateways and other languages.

`POST /classify {"inputs": text}` gives `[{"label", "score"}, ...]` with all experts, whose scores sum to 1; a
list of texts gives a list of such lists. That is what vllm-project/semantic-router takes from external
classifiers (`http_classify`, contract `label_distribution.v1`).
"""

import asyncio
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
)

from mergekit_mediator.engines.conversation import routables
from mergekit_mediator.engines.deciders import Decider
from mergekit_mediator.errors import PromptError, RoutingError
from mergekit_mediator.route.decision import RoutingDecision


def classifier_app(
    decider: Decider, *, largest_body: int = 1 << 20, most_at_once: int = 64
) -> FastAPI:
    """The service's application.

    Args:
        decider: routes texts.
        largest_body: of a request, in bytes; larger ones get status 413.
        most_at_once: requests; more get status 503 and may try again.
    """
    app = FastAPI(title="mergekit-mediator classify")
    registry = CollectorRegistry()
    answered = Counter(
        "mediator_classify_requests", "Requests by status.", ["status"], registry=registry
    )
    seconds = Histogram("mediator_classify_seconds", "Time of an answer.", registry=registry)
    busy = 0

    def refuse(status: int, message: str) -> JSONResponse:
        answered.labels(str(status)).inc()
        headers = {"retry-after": "1"} if status == 503 else None
        return JSONResponse({"error": message}, status, headers)

    @app.post("/classify")
    async def classify(request: Request) -> Response:
        nonlocal busy
        if busy >= most_at_once:
            return refuse(503, f"{busy} requests are being answered: try again")
        busy += 1
        began = time.perf_counter()
        try:
            body = await _body(request, largest_body)
            if body is None:
                return refuse(413, f"at most {largest_body} bytes are taken")
            inputs = _inputs(body)
            texts = [inputs] if isinstance(inputs, str) else inputs
            prompts = [routables({"prompt": text})[0] for text in texts]
            decision = await decider.decide(prompts, "prompt")
            rows = distributions(decision)
            answered.labels("200").inc()
            seconds.observe(time.perf_counter() - began)
            return JSONResponse(rows[0] if isinstance(inputs, str) else rows)
        except (PromptError, RoutingError, ValueError) as error:
            return refuse(400, str(error))
        finally:
            busy -= 1

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        return {"status": "ready", "router": decider.name}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.on_event("shutdown")
    async def close() -> None:
        await asyncio.to_thread(decider.close)

    return app


def distributions(decision: RoutingDecision) -> list[list[dict[str, Any]]]:
    """For each text the experts with their probabilities, likeliest first."""
    rows = []
    for weights in decision.weights.tolist():
        pairs = sorted(zip(decision.experts, weights, strict=True), key=lambda pair: -pair[1])
        rows.append([{"label": name, "score": p} for name, p in pairs])
    return rows


async def _body(request: Request, largest: int) -> bytes | None:
    """The body of a request, or None if it is larger than allowed; no more than that is read."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > largest:
            return None
        parts.append(part)
    return b"".join(parts)


def _inputs(body: bytes) -> str | list[str]:
    """The field `inputs`.

    Raises:
        ValueError: the body is no JSON object with a text or a list of texts.
    """
    import json

    try:
        fields = json.loads(body)
    except ValueError as error:
        raise ValueError(f"the body is no JSON: {error}") from error
    inputs = fields.get("inputs") if isinstance(fields, dict) else None
    if isinstance(inputs, str):
        return inputs
    if isinstance(inputs, list) and inputs and all(isinstance(text, str) for text in inputs):
        return inputs
    raise ValueError('an object {"inputs": text or list of texts} required')
