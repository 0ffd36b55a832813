"""The engines behind a gateway: which are alive, which adapters they list, and how busy they are."""

import asyncio
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import httpx

from mergekit_mediator.engines.names import AUTO

# How much busier than the mean an engine may be and still get the conversations that it knows: consistent
# hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, arXiv 1608.01350).
_BALANCE, _SPARE = 1.25, 4


def most_in_flight(total: int, replicas: int) -> float:
    """The requests beyond which an engine is left alone.

    Args:
        total: requests that all engines answer.
        replicas: the number of engines.
    """
    return _BALANCE * total / replicas + _SPARE


class Replica:
    """One engine.

    Attributes:
        url: of its server, without a path.
        alive: whether it answered last time.
        models: the names that it lists.
        base: the name of its own model, if it is known.
        in_flight: requests that it is answering.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.alive, self.in_flight = True, 0
        self.models: tuple[str, ...] = ()
        self.base: str | None = None

    @property
    def blends(self) -> bool:
        """Whether it makes blends itself, as engines with the vLLM plugin do."""
        return AUTO in self.models

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Count a request while it is answered."""
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1


class Replicas:
    """All engines; each is asked for its models now and then."""

    def __init__(self, urls: Sequence[str], client: httpx.AsyncClient, key: str | None) -> None:
        """Args:
        urls: of the engines.
        client: for requests to them.
        key: for asking them for their models, if they want one.
        """
        self.all = tuple(Replica(url) for url in urls)
        self._client, self._key = client, key

    @property
    def alive(self) -> tuple[Replica, ...]:
        """The engines that answered last time."""
        return tuple(replica for replica in self.all if replica.alive)

    @property
    def models(self) -> tuple[str, ...]:
        """The names that any engine alive lists."""
        return tuple(dict.fromkeys(name for replica in self.alive for name in replica.models))

    @property
    def base(self) -> str | None:
        """The name of the engines' own model, if any has said it."""
        return next((r.base for r in (*self.alive, *self.all) if r.base), None)

    def order(self, model: str, key: str) -> list[Replica]:
        """The engines to try for a request, the best first.

        Those alive come first, those that hold the adapter before others, and those that are not much busier
        than the mean. Among the rest a hash of the key decides, so that requests of one key meet on one
        engine: turns of a conversation find the keys and values of earlier ones there.

        Args:
            model: the adapter's name.
            key: what requests that belong together have in common.
        """
        alive = self.alive
        bound = most_in_flight(sum(r.in_flight for r in alive), max(1, len(alive)))

        def rank(replica: Replica) -> tuple[bool, bool, bool, int]:
            place = zlib.crc32(f"{replica.url} {key}".encode())
            busy = replica.in_flight >= bound
            return not replica.alive, model not in replica.models, busy, place

        return sorted(self.all, key=rank)

    async def ask(self) -> None:
        """Ask every engine for its models; one that does not answer counts as dead until it does."""
        await asyncio.gather(*(self._ask(replica) for replica in self.all))

    async def ask_forever(self, seconds: float) -> None:
        """Ask again and again, so many seconds apart."""
        while True:
            await asyncio.sleep(seconds)
            await self.ask()

    async def _ask(self, replica: Replica) -> None:
        headers = {"authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            response = await self._client.get(
                f"{replica.url}/v1/models", headers=headers, timeout=5.0
            )
            cards = response.raise_for_status().json()["data"]
            names = tuple(str(card["id"]) for card in cards)
            own = [str(card["id"]) for card in cards if not card.get("parent")]
        except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError):
            replica.alive = False
            return
        replica.alive, replica.models = True, names
        replica.base = next((name for name in own if name != AUTO), None)
