"""Times of calls that are compared: they run in turns, so that a busy machine slows all of them down alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turns(rounds: int, **functions: Callable[[], float]) -> dict[str, list[float]]:
    """Each function's times, one of each per round; the first round only warms up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            took = function()
            if turn:
                times[name].append(took)
    return times


def ratio(times: dict[str, list[float]], over: str, under: str) -> float:
    pairs = zip(times[over], times[under], strict=True)
    return round(statistics.median(a / b for a, b in pairs), 3)


def milliseconds(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(1e3 * statistics.median(t), 2) for name, t in times.items()}
