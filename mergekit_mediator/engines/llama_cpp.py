"""llama.cpp's server behind the gateway: it blends, and takes the scale of each adapter with every request.

A request says `"lora": [{"id": 0, "scale": 0.6}, ...]`, and the server lists its adapters' numbers and files at
`/lora-adapters`. `export --format llama.cpp` names the file of an adapter after its expert.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from mergekit_mediator.engines.bodies import json_object
from mergekit_mediator.engines.names import parse
from mergekit_mediator.engines.service import RequestError
from mergekit_mediator.errors import MixtureError, PromptError
from mergekit_mediator.serve.mixture import DENSE_NAME

# The server's owner of its own model, in its list of models.
OWNER = "llamacpp"
# Weights in requests are rounded already; this keeps what `name_of` writes of them.
_GRID = 1_000_000


def adapter_numbers(listed: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return the numbers of a server's adapters by expert.

    Args:
        listed: the answer of `/lora-adapters`.
    """
    return {PurePath(str(adapter["path"])).stem: int(adapter["id"]) for adapter in listed}


def with_scales(body: bytes, numbers: Mapping[str, int], base: str | None) -> bytes:
    """Give a request the scales of all adapters, from the mixture that it names as its model.

    Without `--cache-ram 0` the server takes keys and values of a prompt from its cache that were computed with other
    adapters. So a request that says nothing else gets `"cache_prompt": false`. What is no JSON object passes as it
    is.

    Args:
        body: the body of a request that the gateway has routed.
        numbers: the numbers of the server's adapters by expert.
        base: the server's name of its own model, for which all scales are 0.

    Raises:
        RequestError: the server lacks an adapter; without the error, its own model would answer.
    """
    try:
        fields = json_object(body)
    except PromptError:
        return body
    model = str(fields.get("model") or base)
    weights = {} if model in (base, DENSE_NAME) else _weights(model, tuple(numbers))
    scales = [{"id": number, "scale": weights.get(name, 0.0)} for name, number in numbers.items()]
    return json.dumps({"cache_prompt": False, **fields, "lora": scales}).encode()


def _weights(model: str, experts: Sequence[str]) -> dict[str, float]:
    """Return the weights by expert of a mixture's name.

    Raises:
        RequestError: it names another expert.
    """
    try:
        mixture = parse(model, experts, _GRID)
    except MixtureError as error:
        raise RequestError(str(error), 404, "NotFoundError", "model") from error
    if mixture is None:
        has = ", ".join(experts) or "none"
        raise RequestError(
            f"{model}: an adapter of the engine is required, which has {has}",
            404,
            "NotFoundError",
            "model",
        )
    return dict(mixture.weights)
