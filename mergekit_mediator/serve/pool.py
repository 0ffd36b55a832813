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
            threads: how many; as many as torch has, and has again afterwards.
        """
        self._function, self._left, self._threads = function, iter(list(items)), threads
        self._gate, self._stopped = allocate_lock(), False
        self._ends: list[
            LockType
        ] = []  # of the threads that run: each is released when its thread ends
        self._errors: list[BaseException] = []

    def run(self) -> None:
        """Work through all items. Where this is interrupted, call `stop`.

        Raises:
            BaseException: what the function has raised first.
        """
        for _ in range(self._threads):
            running = _held()
            start_new_thread(self._work, (running, _held()))
            running.acquire()  # of two threads that do not run yet, both may be given one core
        self._wait()
        if self._errors:
            raise self._errors[0]

    def stop(self) -> None:
        """Begin no other item, and wait for those that were begun. May be interrupted, and repeated."""
        with self._gate:
            self._stopped = True
        self._wait()

    def _wait(self) -> None:
        for end in self._ends:
            with end:
                pass

    def _work(self, running: LockType, end: LockType) -> None:
        with self._gate:  # who comes after the end does nothing, and is not waited for
            late = self._stopped
            if not late:
                self._ends.append(end)
        running.release()
        if late:
            return
        try:
            torch.set_num_threads(1)
            for item in self._left:
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
    """A lock that is taken."""
    lock = allocate_lock()
    lock.acquire()
    return lock
