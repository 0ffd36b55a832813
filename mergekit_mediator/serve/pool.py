"""Threads that work through a list together, and are waited for whatever happens to who waits.

Python handles signals in the main thread alone, so that an interrupt ends the waiting and never a call
that a thread has begun. The pools of `concurrent.futures` do not hold that: an interrupt while a thread is
started leaves one that nobody waits for, or one that waits for ever.
"""

from _thread import LockType, allocate_lock, start_new_thread
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Pool(Generic[T]):
    """Calls a function with each item, on several threads with one thread of torch each."""

    def __init__(self, function: Callable[[T], None], items: Iterable[T], threads: int) -> None:
        """
        Args:
            function: called on the threads.
            items: the next one goes to the first thread that asks.
            threads: how many, which torch has again afterwards.
        """
        self._function, self._left = function, iter(list(items))
        self._threads = threads
        self._ends = [allocate_lock() for _ in range(threads)]  # each released by its thread
        self._gate, self._begun, self._stopped = allocate_lock(), list[LockType](), False
        self._errors: list[BaseException] = []

    def run(self) -> None:
        """Work through all items. If this is interrupted, `stop` must be called."""
        for end in self._ends:
            end.acquire()
            start_new_thread(self._work, (end,))
        for end in self._ends:
            with end:
                pass
        if self._errors:
            raise self._errors[0]

    def stop(self) -> None:
        """Begin no other item, and wait for those that were begun. May be interrupted, and repeated."""
        with self._gate:
            self._stopped = True
        for end in self._begun:
            with end:
                pass

    def _work(self, end: LockType) -> None:
        with self._gate:  # who comes after `stop` touches nothing, and need not be waited for
            if self._stopped:
                return
            self._begun.append(end)
        try:
            torch.set_num_threads(1)
            for item in self._left:
                if self._stopped:
                    break
                self._function(item)
        except BaseException as error:  # noqa: BLE001 - `run` raises it
            self._errors.append(error)
            self._stopped = True
        finally:
            torch.set_num_threads(self._threads)
            end.release()
