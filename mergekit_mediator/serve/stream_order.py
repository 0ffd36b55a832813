"""Let requests on several CUDA streams use the weights of a model one after the other.

A lock orders the calls of threads, and calls only start kernels. Without more, the kernels of one request would write
to weights that those of another request, on another stream, still read.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

_CUDA: Any = torch.cuda


class StreamOrder:
    """The end of the last request on each CUDA device, for which the next request waits there."""

    def __init__(self) -> None:
        self._ends: dict[torch.device, Any] = {}

    def begin(self) -> None:
        """Let the kernels of the present streams wait for the last request; this call does not wait."""
        for device, end in self._ends.items():
            _CUDA.current_stream(device).wait_event(end)

    def end(self, devices: Callable[[], Iterable[torch.device]]) -> None:
        """Mark the end of a request in the present streams of the weights' devices."""
        if _CUDA.is_initialized():
            for device in devices():
                if device.type == "cuda":
                    self._ends[device] = _CUDA.current_stream(device).record_event()
