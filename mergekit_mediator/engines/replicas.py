"""The engines behind a gateway: which of them are alive, which adapters they list, and how busy they are."""

import asyncio
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

from mergekit_mediator.engines.llama_cpp import OWNER, adapter_numbers, with_scales
from mergekit_mediator.engines.names import AUTO
from mergekit_mediator.errors import EngineError

# An engine gets the conversations that it knows until it is busier than the mean by this factor and this number:
# consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, arXiv 1608.01350).
_BALANCE, _SPARE = 1.25, 4


def most_in_flight(total: int, replicas: int) -> float:
    """Return the number of requests from which on an engine counts as busy.

    Args:
        total: the number of requests that all engines answer now.
        replicas: the number of engines.
    """
    return _BALANCE * total / replicas + _SPARE


class Replica:
    """One engine.

    Attributes:
        url: the address of its server, without a path.
        alive: whether it answered the last time it was asked.
        models: the model names that it lists.
        base: the name of its own model, or None while that is unknown.
        adapters: the numbers of its adapters by expert if it is llama.cpp's server, else None.
        in_flight: the number of requests that it answers now.
    """

    def __init__(self, url: str) -> None:
        """Start as an engine that is alive and has listed nothing.

        Args:
            url: the address of the server, with or without `/v1`.

        Raises:
            EngineError: the address is no HTTP address.
        """
        _check_address(url)
        self.url = url.rstrip("/").removesuffix("/v1")
        self.alive, self.in_flight = True, 0
        self.models: tuple[str, ...] = ()
        self.base: str | None = None
        self.adapters: dict[str, int] | None = None

    @property
    def blends(self) -> bool:
        """Whether the engine makes blends itself, as llama.cpp does, and vLLM with the plugin."""
        return AUTO in self.models or bool(self.adapters)

    def body(self, body: bytes) -> bytes:
        """Return a routed request's body in this engine's terms.

        Raises:
            RequestError: the engine is llama.cpp's server and lacks an adapter.
        """
        return body if self.adapters is None else with_scales(body, self.adapters, self.base)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Count a request of this engine inside a context."""
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1


class Replicas:
    """All engines of a gateway."""

    def __init__(self, urls: Sequence[str], client: httpx.AsyncClient, key: str | None) -> None:
        """Start with engines that are not asked yet.

        Args:
            urls: the addresses of the engines.
            client: sends the requests to them.
            key: the API key for the lists of models, or None.

        Raises:
            EngineError: an address is no HTTP address.
        """
        self.all = tuple(Replica(url) for url in urls)
        self._client, self._key = client, key

    @property
    def alive(self) -> tuple[Replica, ...]:
        """The engines that answered the last time they were asked."""
        return tuple(replica for replica in self.all if replica.alive)

    @property
    def models(self) -> tuple[str, ...]:
        """The model names that the engines alive list, each once."""
        return tuple(dict.fromkeys(name for replica in self.alive for name in replica.models))

    @property
    def base(self) -> str | None:
        """The name of the engines' own model, or None while no engine has listed it."""
        replicas = (*self.alive, *self.all)
        return next((replica.base for replica in replicas if replica.base), None)

    def order(self, model: str, key: str) -> list[Replica]:
        """Order the engines for a request, the best first.

        Engines alive come first; of these, the ones that hold the adapter; of these, the ones that are not
        much busier than the mean. A hash of the key orders the rest, so that one engine gets all requests of
        a key: the turns of a conversation find the keys and values of earlier turns there.

        Args:
            model: the adapter's name.
            key: a text that requests share if they belong together.
        """
        alive = self.alive
        total = sum(replica.in_flight for replica in alive)
        bound = most_in_flight(total, max(1, len(alive)))

        def rank(replica: Replica) -> tuple[bool, bool, bool, int]:
            place = zlib.crc32(f"{replica.url} {key}".encode())
            is_busy = replica.in_flight >= bound
            return not replica.alive, model not in replica.models, is_busy, place

        return sorted(self.all, key=rank)

    async def ask(self) -> None:
        """Ask every engine for its models; an engine without an answer is dead until it answers again."""
        await asyncio.gather(*(self._ask(replica) for replica in self.all))

    async def ask_forever(self, seconds: float) -> None:
        """Ask every engine again and again, with this many seconds between."""
        while True:
            await asyncio.sleep(seconds)
            await self.ask()

    async def _ask(self, replica: Replica) -> None:
        try:
            cards = (await self._list(f"{replica.url}/v1/models"))["data"]
            names = [str(card["id"]) for card in cards]
            bases = [str(card["id"]) for card in cards if not card.get("parent")]
            adapters = None
            if any(card.get("owned_by") == OWNER for card in cards):
                adapters = adapter_numbers(await self._list(f"{replica.url}/lora-adapters"))
        except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError):
            replica.alive = False
            return
        replica.alive, replica.models = True, (*names, *(adapters or ()))
        replica.adapters = adapters
        replica.base = next((name for name in bases if name != AUTO), None)

    async def _list(self, url: str) -> Any:
        """Return the JSON value at an address."""
        headers = {"authorization": f"Bearer {self._key}"} if self._key else {}
        response = await self._client.get(url, headers=headers, timeout=5.0)
        return response.raise_for_status().json()


def _check_address(url: str) -> None:
    """Refuse an address that no request can be sent to.

    Raises:
        EngineError: the address is no HTTP address.
    """
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise EngineError(
            f"engine {url!r}: an address such as http://localhost:8000 is required: {error}"
        ) from error
    if address.scheme not in ("http", "https") or not address.host:
        raise EngineError(
            f"engine {url!r}: an address such as http://localhost:8000 is required: begin it with "
            "http:// or https://"
        )
