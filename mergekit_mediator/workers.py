"""Runs torch work on several threads of Python, each with one thread of torch.

torch splits each operation over all cores and waits for the slowest. The work of a merge is many
short operations on chunks that fit a cache, so that it is faster, on a busy machine by far, to give
each core chunks of its own.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Map(Protocol):
    """What the built-in `map` does for a function of one argument."""

    def __call__(self, function: Callable[[T], R], items: Iterable[T], /) -> Iterable[R]: ...


@contextmanager
def workers() -> Iterator[Map]:
    """A `map` that uses as many threads as torch would; torch has its own threads back afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)
