"""Runs torch work on several threads of Python, which share the threads of torch among them.

torch splits each operation over all cores and waits for the slowest. The work of a merge is many
short operations on chunks that fit a cache, so that it is faster, on a busy machine by far, to give
each core weights of its own.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

# Each worker holds what its own weight needs: more of them would need more memory than they save time.
_MOST = 4


class Workers:
    """A few threads that work through a list in order; use `workers`."""

    def __init__(self, pool: ThreadPoolExecutor, count: int, threads: int) -> None:
        self._pool, self.count, self._threads = pool, count, threads

    def __call__(
        self,
        function: Callable[[T], R],
        items: Iterable[T],
        size: Callable[[T], int] = lambda _: 1,
    ) -> Iterator[R]:
        """The results of a function of one argument, in the order of the items.

        Never more is begun and not yet taken than if every worker had the largest item so far, by
        `size`: a large item holds up nobody, and memory does not depend on the number of items.
        """
        pending: deque[tuple[Future[R], int]] = deque()
        largest = begun = 0
        try:
            for item in items:
                weight = size(item)
                largest = max(largest, weight)
                while pending and begun + weight > self.count * largest:
                    future, done = pending.popleft()
                    yield future.result()
                    begun -= done
                pending.append((self._pool.submit(function, item), weight))
                begun += weight
            while pending:
                yield pending.popleft()[0].result()
        finally:
            for future, _ in pending:
                future.cancel()

    @contextmanager
    def idle(self) -> Iterator[None]:
        """torch has all its threads back while the workers have nothing to do."""
        few = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(few)


def count_workers() -> int:
    """How many workers there are on this machine."""
    return min(_MOST, torch.get_num_threads())


@contextmanager
def workers() -> Iterator[Workers]:
    """As many workers as pay off; torch has its own threads back afterwards."""
    threads, count = torch.get_num_threads(), count_workers()
    torch.set_num_threads(max(1, threads // count))
    try:
        with ThreadPoolExecutor(count) as pool:
            yield Workers(pool, count, threads)
    finally:
        torch.set_num_threads(threads)
