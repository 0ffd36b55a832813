"""Work through a list on several threads, and wait for all of them even where an interrupt falls.

Python handles signals in the main thread alone, so an interrupt ends the wait and never a call that another
thread has begun. The pools of `concurrent.futures` do not serve here: an interrupt while one starts a thread
leaves a thread that nobody waits for, or a thread that waits for ever.
"""

from _thread import LockType, allocate_lock, start_new_thread
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Pool(Generic[T]):
    """Call a function with each item, on several threads; torch runs on one thread inside each."""

    def __init__(self, function: Callable[[T], None], items: Iterable[T], threads: int) -> None:
        """Prepare the threads; `run` starts them.

        Args:
            function: the function; the threads call it.
            items: the arguments; each goes to the first thread that is free.
            threads: the number of threads; it is torch's own number, which the pool sets again at the end.
        """
        self._function, self._items, self._threads = function, iter(list(items)), threads
        self._gate, self._stopped = allocate_lock(), False
        # One lock for each thread that runs; the thread releases it at its end.
        self._ends: list[LockType] = []
        self._errors: list[BaseException] = []

    def run(self) -> None:
        """Work through all items. After an interrupt of this call, call `stop`.

        Raises:
            BaseException: the first error that the function has raised.
        """
        for _ in range(self._threads):
            running = _held()
            start_new_thread(self._work, (running, _held()))
            running.acquire()  # two threads that start at once may both get the same core
        self._wait()
        if self._errors:
            raise self._errors[0]

    def stop(self) -> None:
        """Begin no further item, and wait for the threads. An interrupted call may be repeated."""
        with self._gate:
            self._stopped = True
        self._wait()

    def _wait(self) -> None:
        for end in self._ends:
            with end:
                pass

    def _work(self, running: LockType, end: LockType) -> None:
        with self._gate:  # a thread that starts after `stop` does nothing, and nobody waits for it
            late = self._stopped
            if not late:
                self._ends.append(end)
        running.release()
        if late:
            return
        try:
            torch.set_num_threads(1)
            for item in self._items:
                self._function(item)
                if self._stopped:
                    break
        except BaseException as error:  # noqa: BLE001 - `run` raises it
            self._errors.append(error)
            self._stopped = True
        finally:
            torch.set_num_threads(self._threads)
            end.release()


def _held() -> LockType:
    """Make a lock and take it."""
    lock = allocate_lock()
    lock.acquire()
    return lock
