"""Long tensors in pieces that suit the device that computes, in float32."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Coordinates at a time. On a CPU few enough for its cache, and enough to hide the cost of a call of torch; `conflict`
# packs eight signs a byte, so it is a multiple of 8. On another device a call costs as much as millions of coordinates.
CHUNK, DEVICE_CHUNK = 1 << 17, 1 << 26


def chunks(numel: int, device: str | torch.device = "cpu") -> Iterator[slice]:
    """Cut `numel` coordinates into slices of at most CHUNK, or of DEVICE_CHUNK if the device is no CPU."""
    size = CHUNK if torch.device(device).type == "cpu" else DEVICE_CHUNK
    for start in range(0, numel, size):
        yield slice(start, min(start + size, numel))


def float_on(device: str | torch.device, weights: Tensor) -> Tensor:
    """Copy weights of any floating dtype to a device, and widen them there: half the bytes travel."""
    return weights.to(device).to(torch.float32)
