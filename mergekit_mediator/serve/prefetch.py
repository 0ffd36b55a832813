"""Reads the next layer's experts while the present layer is put in place.

On CUDA, reading means copying from pinned host memory, on a stream of its own beside the one that
computes. On other devices reading is done when it is asked for, in the same order.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol, TypeVar

import torch

L = TypeVar("L")
T = TypeVar("T")


class SideStream(Protocol):
    """Where copies to a device are made, beside what the device computes."""

    def copying(self) -> AbstractContextManager[object]:
        """Inside, copies go to this stream; what is computed does not wait for them."""
        ...

    def ready(self) -> Callable[[], None]:
        """Gives what makes computation wait for the copies that were started until now."""
        ...


class CudaStream:
    """A stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copying(self) -> AbstractContextManager[object]:
        # The memory of the layer before the present one may be given to the copies: they wait until
        # nothing that was asked for until now uses it any more. The present layer comes after that.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        stream: AbstractContextManager[object] = torch.cuda.stream(self._stream)
        return stream

    def ready(self) -> Callable[[], None]:
        event = self._stream.record_event()

        def wait() -> None:
            torch.cuda.current_stream(self._device).wait_event(event)

        return wait


def side_streams(devices: Collection[torch.device]) -> list[SideStream]:
    """One for each CUDA device."""
    return [CudaStream(device) for device in devices if device.type == "cuda"]


def read_ahead(
    layers: Iterable[L], read: Callable[[L], T], streams: Collection[SideStream]
) -> Iterator[tuple[L, T]]:
    """Each layer with what `read` gives for it; reading the next has been started by then.

    Args:
        layers: in the order in which they are used.
        read: reads one layer; copies that it starts may still be on their way when it returns.
        streams: to copy on.
    """
    present: tuple[L, T, list[Callable[[], None]]] | None = None
    for layer in layers:
        with ExitStack() as stack:
            for stream in streams:
                stack.enter_context(stream.copying())
            coming = (layer, read(layer), [stream.ready() for stream in streams])
        if present is not None:
            yield _arrived(*present)
        present = coming
    if present is not None:
        yield _arrived(*present)


def _arrived(layer: L, found: T, ready: list[Callable[[], None]]) -> tuple[L, T]:
    for wait in ready:
        wait()
    return layer, found
