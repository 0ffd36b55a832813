"""Products of float32 matrices in full precision, whatever the program around allows."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch

_MATMUL: Any = torch.backends.cuda.matmul
# torch 2.9 renamed the setting, and refuses to read the old name once a program has set the new one.
_NAME, _FULL = (
    ("fp32_precision", "ieee") if hasattr(_MATMUL, "fp32_precision") else ("allow_tf32", False)
)


class _Guard:
    """How many calls need full precision now, and the setting that comes back after the last of them."""

    def __init__(self) -> None:
        self._lock, self._calls, self._before = Lock(), 0, _FULL

    def enter(self) -> None:
        with self._lock:
            self._calls += 1
            if self._calls == 1:
                self._before = getattr(_MATMUL, _NAME)
                self._set(_FULL)

    def leave(self) -> None:
        with self._lock:
            self._calls -= 1
            if not self._calls:
                self._set(self._before)

    def _set(self, value: Any) -> None:
        if self._before in ("tf32", True):
            setattr(_MATMUL, _NAME, value)


_guard = _Guard()


@contextmanager
def full_precision() -> Iterator[None]:
    """Do without TF32 inside the context, or in a function that this decorates.

    TF32 keeps 10 bits of a factor's mantissa: the product that is subtracted from a difference would not be the one
    that a decoder adds, and small singular vectors would drown in the rounding of large ones. The setting is one
    for all threads, so that products of other threads are exact, too, meanwhile.
    """
    _guard.enter()
    try:
        yield
    finally:
        _guard.leave()
