"""Python threads that run torch operations and share the threads of torch.

torch splits each operation over all cores and waits for the slowest core. A merge runs many short operations
on chunks that fit a cache. It is faster to give each core weights of its own, and much faster on a busy machine.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

# Each worker holds tensors of its own: more workers would cost more memory than the time they save is worth.
_MOST = 4


class Workers:
    """A few threads that work through items in order; `workers` makes them.

    Attributes:
        count: the number of threads.
    """

    def __init__(self, pool: ThreadPoolExecutor, count: int, threads: int) -> None:
        """Take over a pool.

        Args:
            pool: the threads.
            count: the number of threads in the pool.
            threads: the number of torch's threads while the workers are idle.
        """
        self._pool, self.count, self._threads = pool, count, threads

    def __call__(
        self,
        function: Callable[[T], R],
        items: Iterable[T],
        size: Callable[[T], int] = lambda _: 1,
    ) -> Iterator[R]:
        """Apply a function to all items; yield the results in the order of the items.

        At most `count` times the largest size so far is in flight, so memory does not grow with the number
        of items, and the other workers go on while one has a large item.

        Args:
            function: a thread-safe function of one item.
            items: the items.
            size: the size of an item, in any unit.
        """
        pending: deque[tuple[Future[R], int]] = deque()
        largest = total = 0
        try:
            for item in items:
                weight = size(item)
                largest = max(largest, weight)
                while pending and total + weight > self.count * largest:
                    future, oldest = pending.popleft()
                    yield future.result()
                    total -= oldest
                pending.append((self._pool.submit(function, item), weight))
                total += weight
            while pending:
                yield pending.popleft()[0].result()
        finally:
            for future, _ in pending:
                future.cancel()

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Give torch all its threads inside the context, in which the workers have nothing to do."""
        few = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(few)


def count_workers() -> int:
    """Count the workers of a merge on this machine."""
    return min(_MOST, torch.get_num_threads())


def load_linear_algebra(device: str) -> None:
    """Load the linear algebra of a CUDA device. torch fails if several threads are the first to need it.

    See https://github.com/pytorch/pytorch/issues/90613.
    """
    if torch.device(device).type == "cuda":
        torch.linalg.inv(torch.eye(1, device=device))


@contextmanager
def workers() -> Iterator[Workers]:
    """Start the workers, and share the threads of torch among them inside the context."""
    threads, count = torch.get_num_threads(), count_workers()
    torch.set_num_threads(max(1, threads // count))
    try:
        with ThreadPoolExecutor(count) as pool:
            yield Workers(pool, count, threads)
    finally:
        torch.set_num_threads(threads)
