"""Where requests go in a cluster: a simulation of adapters, caches and tail latency.

    python benchmarks/replicas.py [--seconds 20]

Engines are servers of so many requests at once, with two least-recently-used caches of adapters: one on the
card and one in the memory of its host. Requests are the turns of conversations, each with one expert, whose
popularity falls as 1/rank. A turn that comes to the engine of the turn before finds its keys and values there.
Times are assumptions, in `ASSUMED`, not measurements. Policies are: `any` takes the least busy engine,
`conversation` and `adapter` the gateway's rule, which hashes one of the two, and leaves out engines that are much busier than others.
"""

import argparse
import heapq
import itertools
import random
import zlib
from collections import OrderedDict
from typing import Any

import record

from mergekit_mediator.engines.replicas import most_in_flight

EXPERTS, RATES, REPLICAS = (8, 64, 512), (100, 1000), (1, 2, 4, 8, 16, 32, 64)
POLICIES = ("any", "conversation", "adapter")
ASSUMED = {
    "requests_at_once": 64,  # of an engine
    "adapters_on_card": 16,
    "adapters_in_host_memory": 64,
    "seconds_from_host_memory": 0.015,  # 320 MB over PCIe
    "seconds_from_disk": 0.3,
    "seconds_of_prefill": 0.2,  # saved by a conversation whose keys and values are there
    "seconds_of_decoding": 1.0,  # mean, exponential
    "turns": 4,  # mean, geometric
    "seconds_between_turns": 5.0,  # mean, exponential
}


class Cache:
    """The names that were used last."""

    def __init__(self, size: int) -> None:
        self._size, self._names = size, OrderedDict[int, None]()

    def has(self, name: int) -> bool:
        """Whether a name is there; it is afterwards."""
        hit = name in self._names
        self._names[name] = None
        self._names.move_to_end(name)
        if len(self._names) > self._size:
            self._names.popitem(last=False)
        return hit


class Engine:
    """One engine: when each of its places is free, and what its caches hold."""

    def __init__(self) -> None:
        self._free = [0.0] * int(ASSUMED["requests_at_once"])
        self._ends: list[float] = []
        self.card = Cache(int(ASSUMED["adapters_on_card"]))
        self.host = Cache(int(ASSUMED["adapters_in_host_memory"]))
        self.adapters: set[int] = set()

    def in_flight(self, now: float) -> int:
        """Requests that wait or are answered."""
        while self._ends and self._ends[0] <= now:
            heapq.heappop(self._ends)
        return len(self._ends)

    def take(self, now: float, seconds: float) -> float:
        """Answer a request that takes so long; gives when it ends."""
        end = max(now, self._free[0]) + seconds
        heapq.heapreplace(self._free, end)
        heapq.heappush(self._ends, end)
        return end


def requests(experts: int, rate: float, seconds: float, chance: random.Random) -> list[Any]:
    """Time, conversation and expert of every request, by time."""
    weights = [1 / (n + 1) for n in range(experts)]
    result = []
    starts = rate / ASSUMED["turns"]
    now = -3 * ASSUMED["turns"] * ASSUMED["seconds_between_turns"]  # until the rate is steady
    for conversation in itertools.count():
        now += chance.expovariate(starts)
        if now >= seconds:
            break
        expert, at = chance.choices(range(experts), weights)[0], now
        while True:
            if 0 <= at < seconds:
                result.append((at, conversation, expert))
            if chance.random() < 1 / ASSUMED["turns"]:
                break
            at += chance.expovariate(1 / ASSUMED["seconds_between_turns"])
    return sorted(result)


def simulate(experts: int, rate: int, count: int, policy: str, seconds: float) -> dict[str, Any]:
    """The figures of one cluster under one policy; the first third warms up and is not counted."""
    chance = random.Random(f"{experts} {rate} {count}")
    engines = [Engine() for _ in range(count)]
    places: dict[int, list[int]] = {}
    home: dict[int, int] = {}
    waits, misses, from_disk, kept, turns = [], 0, 0, 0, 0
    for now, conversation, expert in requests(experts, rate, seconds, chance):
        key = conversation if policy == "conversation" else expert
        if key not in places:
            places[key] = [
                zlib.crc32(f"http://engine-{n}:8000 {key}".encode()) for n in range(count)
            ]
        load = [engine.in_flight(now) for engine in engines]
        if policy == "any":
            chosen = min(range(count), key=lambda n: (load[n], chance.random()))
        else:
            bound = most_in_flight(sum(load), count)
            chosen = min(range(count), key=lambda n: (load[n] >= bound, places[key][n]))
        engine = engines[chosen]
        on_card, in_host = engine.card.has(expert), engine.host.has(expert)
        engine.adapters.add(expert)
        stays = home.get(conversation) == chosen
        work = chance.expovariate(1 / ASSUMED["seconds_of_decoding"])
        extra = 0.0 if stays else ASSUMED["seconds_of_prefill"]
        if not on_card:
            extra += ASSUMED["seconds_from_host_memory" if in_host else "seconds_from_disk"]
        end = engine.take(now, work + extra)
        if now > seconds / 3:
            waits.append(end - now - work)
            misses += not on_card
            from_disk += not on_card and not in_host
            turns += conversation in home
            kept += stays
        home[conversation] = chosen
    waits.sort()
    return {
        "experts": experts,
        "rate": rate,
        "replicas": count,
        "policy": policy,
        "adapters_per_replica": sum(len(e.adapters) for e in engines) / count,
        "card_misses": misses / len(waits),
        "disk_loads": from_disk / len(waits),
        "turns_kept": kept / turns,
        "added_median_s": waits[len(waits) // 2],
        "added_p99_s": waits[int(0.99 * len(waits))],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of every cluster's life")
    arguments = parser.parse_args()
    busiest = ASSUMED["seconds_of_decoding"] + ASSUMED["seconds_of_prefill"]
    capacity = ASSUMED["requests_at_once"] / busiest
    rows = []
    for experts, rate, count in itertools.product(EXPERTS, RATES, REPLICAS):
        if rate > capacity * count:
            continue  # such a cluster only falls behind
        for policy in POLICIES:
            rows.append(simulate(experts, rate, count, policy, arguments.seconds))
            print(rows[-1], flush=True)
    figures = {"assumed": ASSUMED, "requests_a_second_of_a_replica": capacity, "rows": rows}
    print(record.write("replicas", figures, {"requests": 0}))


if __name__ == "__main__":
    main()
