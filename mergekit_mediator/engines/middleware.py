"""An ASGI middleware that routes requests of OpenAI's form before a server sees them.

It reads a request's body, replaces `model` by the name of the adapter that answers, and adds the decision to
the response. All other requests pass unchanged.
"""

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from mergekit_mediator.engines.bodies import (
    LARGEST_BODY,
    Message,
    Receive,
    json_object,
    read_body,
)
from mergekit_mediator.engines.conversation import PROMPT_FIELDS
from mergekit_mediator.engines.service import RequestError, Resolved, Service
from mergekit_mediator.errors import PromptError

Scope = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEADER = b"x-mediator-mixture"
# The blank line that ends an event of a stream.
_END_OF_EVENT = re.compile(rb"\r?\n\r?\n")


class RouteRequests:
    """A middleware that routes the POST requests which name a model or hold a prompt."""

    def __init__(self, app: App, service: Callable[[Scope], Awaitable[Service | None]]) -> None:
        """Wrap an application.

        Args:
            app: the application that gets the routed requests.
            service: returns the service of a request's application, or None while there is none.
        """
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request: route it if it can be routed, else pass it on unchanged."""
        service = None
        if scope["type"] == "http" and scope["method"] == "POST" and _is_json(scope):
            service = await self._service(scope)
        if service is None:
            await self._app(scope, receive, send)
            return
        try:
            raw = await read_body(receive, LARGEST_BODY)
            if raw is None:
                limit = f"a body of at most {LARGEST_BODY >> 20} MiB is required, got a larger one"
                raise RequestError(limit, 413, "BadRequestError")
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
                response = _Response(send, answer, service.settings.say)
                await self._app(scope, _replay(changed, receive), response)
        except RequestError as error:
            await _respond(send, error.status, error.body())


class _Response:
    """A sender that adds the decision to a response: to its headers, and to its JSON object or first event."""

    def __init__(self, send: Send, answer: Resolved, say: tuple[str, ...]) -> None:
        """Wrap a sender.

        Args:
            send: the ASGI function that takes the response's messages.
            answer: the decision.
            say: the places for the decision: `header`, `body`, both or none.
        """
        self._send, self._answer, self._say = send, answer, say
        self._start: Message | None = None
        self._body = b""
        self._is_stream = self._done = False

    async def __call__(self, message: Message) -> None:
        """Send one message of the response, with the decision if this is its place."""
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            if "header" in self._say:
                headers.append((HEADER, self._answer.name.encode("latin-1", "replace")))
            kind = dict(headers).get(b"content-type", b"")
            self._is_stream = kind.startswith(b"text/event-stream")
            in_body = "body" in self._say and message["status"] == 200
            if in_body and (self._is_stream or kind.startswith(b"application/json")):
                headers = [pair for pair in headers if pair[0] != b"content-length"]
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
        """Hold a stream back until its first event is whole, and send that event with the decision."""
        self._body += message.get("body", b"")
        more = message.get("more_body", False)
        end = _END_OF_EVENT.search(self._body)
        if end is None and more:
            return
        length = len(self._body) if end is None else end.start()
        lines = self._body[:length].splitlines(keepends=True)
        self._done = True
        body = b"".join(map(self._with_decision, lines)) + self._body[length:]
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    def _with_decision(self, line: bytes) -> bytes:
        """Add the decision to a line of an event, if the line is data and a JSON object."""
        if not line.startswith(b"data: {"):
            return line
        fields = _parse(line.removeprefix(b"data: "))
        if fields is None:
            return line
        end = line[len(line.rstrip(b"\r\n")) :]
        return b"data: " + json.dumps({**fields, "mediator": self._answer.as_json()}).encode() + end

    async def _whole(self, message: Message) -> None:
        """Hold a JSON response back until it is whole, and send it with the decision."""
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
    return bool(kind.lower().startswith(b"application/json"))


def _names_a_model(body: dict[str, Any]) -> bool:
    """Tell whether a request names a model, or has a prompt and no model: then the dense expert answers."""
    model = body.get("model")
    return isinstance(model, str) or (model is None and not body.keys().isdisjoint(PROMPT_FIELDS))


def _replay(body: bytes, rest: Receive) -> Receive:
    """Make the application's receiver: it gives the body at once, then later messages, such as a disconnection."""
    is_sent = False

    async def receive() -> Message:
        nonlocal is_sent
        if not is_sent:
            is_sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await rest()

    return receive


def _parse(raw: bytes) -> dict[str, Any] | None:
    """Parse a JSON object; return None for all else, which passes unchanged."""
    try:
        return json_object(raw)
    except PromptError:
        return None


def _with_length(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    others = [(name, value) for name, value in headers if name != b"content-length"]
    return [*others, (b"content-length", str(length).encode())]


async def _respond(send: Send, status: int, body: dict[str, Any]) -> None:
    content = json.dumps(body).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content, "more_body": False})
