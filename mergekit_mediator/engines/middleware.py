"""An ASGI middleware that routes requests of OpenAI's form before a server sees them.

It reads the body of a request, replaces `model` by the name of the adapter that answers, and says in the
response what was decided. Everything else passes through untouched.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from mergekit_mediator.engines.conversation import PROMPT_FIELDS
from mergekit_mediator.engines.service import RequestError, Resolved, Service

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEADER = b"x-mediator-mixture"
_LARGEST_BODY = 64 << 20


class RouteRequests:
    """Routes the POST requests of an application that name a model."""

    def __init__(self, app: App, service: Callable[[Scope], Awaitable[Service | None]]) -> None:
        """Args:
        app: the application.
        service: gives the service of a request's application, or None while there is none.
        """
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = None
        if scope["type"] == "http" and scope["method"] == "POST" and _is_json(scope):
            service = await self._service(scope)
        if service is None:
            await self._app(scope, receive, send)
            return
        try:
            raw = await _read_body(receive)
            body = _parse(raw)
            if body is None or not _names_a_model(body):
                await self._app(scope, _replay(raw, receive), send)
                return
            async with service.resolved(body.get("model"), body) as answer:
                if answer is None:
                    await self._app(scope, _replay(raw, receive), send)
                    return
                changed = json.dumps({**body, "model": service.engine_name(answer)}).encode()
                scope = {**scope, "headers": _with_length(scope["headers"], len(changed))}
                saying = _Saying(send, answer, service.settings.say)
                await self._app(scope, _replay(changed, receive), saying)
        except RequestError as error:
            await _respond(send, error.status, error.body())


class _Saying:
    """Adds the decision to a response: as a header, and to a JSON object or the first event of a stream."""

    def __init__(self, send: Send, answer: Resolved, say: tuple[str, ...]) -> None:
        self._send, self._answer, self._say = send, answer, say
        self._start: Message | None = None
        self._body = b""
        self._is_stream = self._done = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            if "header" in self._say:
                headers.append((HEADER, self._answer.name.encode("latin-1", "replace")))
            kind = dict(headers).get(b"content-type", b"")
            self._is_stream = kind.startswith(b"text/event-stream")
            in_body = "body" in self._say and message["status"] == 200
            if in_body and (self._is_stream or kind.startswith(b"application/json")):
                headers = [(k, v) for k, v in headers if k != b"content-length"]
                self._start = {**message, "headers": headers}
                if self._is_stream:
                    await self._send(self._start)
            else:
                self._done = True
                await self._send({**message, "headers": headers})
            return
        if self._done or message["type"] != "http.response.body":
            await self._send(message)
        elif self._is_stream:
            await self._first_event(message)
        else:
            await self._whole(message)

    async def _first_event(self, message: Message) -> None:
        self._body += message.get("body", b"")
        more = message.get("more_body", False)
        if b"\n\n" not in self._body and more:
            return
        event, separator, rest = self._body.partition(b"\n\n")
        lines = [self._with_decision(line) for line in event.split(b"\n")]
        self._done = True
        body = b"\n".join(lines) + separator + rest
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    def _with_decision(self, line: bytes) -> bytes:
        if not line.startswith(b"data: {"):
            return line
        fields = _parse(line.removeprefix(b"data: "))
        if fields is None:
            return line
        return b"data: " + json.dumps({**fields, "mediator": self._answer.as_json()}).encode()

    async def _whole(self, message: Message) -> None:
        self._body += message.get("body", b"")
        if message.get("more_body", False):
            return
        fields = _parse(self._body)
        body = self._body
        if fields is not None:
            body = json.dumps({**fields, "mediator": self._answer.as_json()}).encode()
        start = self._start or {"type": "http.response.start", "status": 200, "headers": []}
        length = (b"content-length", str(len(body)).encode())
        await self._send({**start, "headers": [*start["headers"], length]})
        self._done = True
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


def _is_json(scope: Scope) -> bool:
    kind = dict(scope["headers"]).get(b"content-type", b"application/json")
    return bool(kind.startswith(b"application/json"))


def _names_a_model(body: dict[str, Any]) -> bool:
    """Whether a request names a model, or asks a question without: the engine's own model answers then."""
    model = body.get("model")
    return isinstance(model, str) or (model is None and not body.keys().isdisjoint(PROMPT_FIELDS))


async def _read_body(receive: Receive) -> bytes:
    """The body of a request.

    Raises:
        RequestError: it is too large.
    """
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            break
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > _LARGEST_BODY:
            limit = f"a body of at most {_LARGEST_BODY >> 20} MiB is taken"
            raise RequestError(limit, 413, "BadRequestError")
        if not message.get("more_body", False):
            break
    return b"".join(parts)


def _replay(body: bytes, rest: Receive) -> Receive:
    """What the application receives: the body at once, then whatever comes, such as a disconnection."""
    told = False

    async def receive() -> Message:
        nonlocal told
        if not told:
            told = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await rest()

    return receive


def _parse(raw: bytes) -> dict[str, Any] | None:
    try:
        fields = json.loads(raw)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None


def _with_length(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    rest = [(k, v) for k, v in headers if k != b"content-length"]
    return [*rest, (b"content-length", str(length).encode())]


async def _respond(send: Send, status: int, body: dict[str, Any]) -> None:
    content = json.dumps(body).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content, "more_body": False})
