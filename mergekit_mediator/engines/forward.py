"""Forward a request to the first engine that begins an answer, and pass the answer on."""

from collections.abc import AsyncIterator, Mapping, Sequence
from urllib.parse import quote

import httpx
from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from prometheus_client import Counter

from mergekit_mediator.engines.replicas import Replica
from mergekit_mediator.engines.service import RequestError

# Headers that belong to one connection, and headers that the HTTP libraries write themselves.
_OF_CONNECTIONS = {"connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer"}
_OF_LIBRARIES = {"host", "content-length", "accept-encoding", "content-encoding", "date", "server"}
_AWAY = {502, 503, 504}  # the statuses of proxies without an engine, and of engines that start


async def forward_request(
    client: httpx.AsyncClient,
    order: Sequence[Replica],
    request: Request,
    path: str,
    body: bytes,
    retries: Counter,
) -> Response:
    """Return the answer of the first engine that begins one.

    Args:
        client: sends the request to the engines.
        order: the engines, in the order in which they are tried.
        request: the client's request, for its headers and query.
        path: the path below `/v1/`, decoded.
        body: the request's body.
        retries: counts every engine after the first.

    Raises:
        RequestError: no engine answers, or the engine lacks the adapter.
    """
    headers = _passed(request.headers)
    query = request.scope["query_string"].decode(
        "latin-1"
    )  # a decoded path may hold a question mark
    target = f"/v1/{quote(path)}?{query}" if query else f"/v1/{quote(path)}"
    reason = "there is no engine"
    for attempt, replica in enumerate(order):
        if attempt:
            retries.inc()
        url = f"{replica.url}{target}"
        content = replica.body(body)
        forwarded = client.build_request("POST", url, headers=headers, content=content)
        with replica.answering():  # until its answer begins; a stream counts itself
            try:
                answer = await client.send(forwarded, stream=True)
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
    """Wait for the first bytes of a stream, or for the whole of any other answer.

    Raises:
        httpx.TransportError: the engine fails before.
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


def _passed(headers: Mapping[str, str]) -> dict[str, str]:
    """Select the headers that pass through the gateway."""
    blocked = _OF_CONNECTIONS | _OF_LIBRARIES
    return {name: value for name, value in headers.items() if name.lower() not in blocked}
