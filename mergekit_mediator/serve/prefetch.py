"""Read the next layer's experts while the present layer is put in place.

On CUDA, reading copies from pinned host memory, on a side stream beside the stream that computes. On other
devices each layer is read right before it is used, in the same order.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import cache
from typing import Any, Protocol, TypeVar

import torch

L = TypeVar("L")
T = TypeVar("T")


class SideStream(Protocol):
    """A stream of copies to a device, beside the stream that computes."""

    def copying(self) -> AbstractContextManager[object]:
        """Send copies to this stream inside the context; computation does not wait for them."""
        ...

    def ready(self) -> Callable[[], None]:
        """Return a function that makes computation wait for the copies started until now."""
        ...


class CudaStream:
    """A side stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, _side_stream(device)

    def copying(self) -> AbstractContextManager[object]:
        """See `SideStream.copying`."""
        # Copies may get the memory of the layer before the present one. They wait for all computation that
        # was started until now, because it may still use that memory. The present layer starts later.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        stream: AbstractContextManager[object] = torch.cuda.stream(self._stream)
        return stream

    def ready(self) -> Callable[[], None]:
        """See `SideStream.ready`."""
        event = self._stream.record_event()

        def wait() -> None:
            torch.cuda.current_stream(self._device).wait_event(event)

        return wait


@cache
def _side_stream(device: torch.device) -> Any:
    """One stream for all mixtures of a device: torch keeps freed memory apart for every stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def side_streams(devices: Collection[torch.device]) -> list[SideStream]:
    """Make a side stream for each CUDA device."""
    return [CudaStream(device) for device in devices if device.type == "cuda"]


def read_ahead(
    layers: Iterable[L], read: Callable[[L], T], streams: Collection[SideStream]
) -> Iterator[tuple[L, T]]:
    """Read each layer before the one ahead of it is used.

    Args:
        layers: the layers, in the order of use.
        read: reads one layer; the copies that it starts may end after it returns.
        streams: the streams that copy.

    Yields:
        Each layer with the result of `read`; its copies have arrived and the next layer's have started.
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


def _arrived(layer: L, content: T, ready: list[Callable[[], None]]) -> tuple[L, T]:
    for wait in ready:
        wait()
    return layer, content
