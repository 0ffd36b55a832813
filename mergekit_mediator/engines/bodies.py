"""The bodies of HTTP requests: read up to a limit, and parsed as JSON objects."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from mergekit_mediator.errors import PromptError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

# The largest body of a request that is routed or forwarded, in bytes.
LARGEST_BODY = 64 << 20


async def read_body(receive: Receive, largest: int) -> bytes | None:
    """Read a request's body, and stop after `largest` bytes.

    Args:
        receive: the ASGI function that gives the request's messages.
        largest: the most bytes that are read.

    Returns:
        The body, as far as the client sent it; None if it is larger.
    """
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            break
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > largest:
            return None
        if not message.get("more_body", False):
            break
    return b"".join(parts)


def json_object(body: bytes) -> dict[str, Any]:
    """Parse a body that is a JSON object.

    Raises:
        PromptError: the body is no JSON, is nested too deeply, or is no object.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"the body is no JSON: {error}: send a JSON object") from error
    if not isinstance(fields, dict):
        raise PromptError(f"the body: a JSON object is required, got {type(fields).__name__}")
    return fields
