"""A candidate: one kernel that puts the coordinates of a sparse part in place, with the low-rank part there."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mergekit_mediator.delta.stored_weight import StoredWeight


@triton.jit
def _put(
    weight,
    saved,
    positions,
    codes,
    left,
    right,
    scale,
    shift,
    count,
    width,
    rank,
    block: tl.constexpr,
):  # type: ignore[no-untyped-def]
    lanes = tl.program_id(0) * block + tl.arange(0, block)
    inside = lanes < count
    place = tl.load(positions + lanes, mask=inside, other=0)
    code = tl.load(codes + lanes, mask=inside, other=0).to(tl.float32)
    sign = tl.where(code > 0, 1.0, tl.where(code < 0, -1.0, 0.0))
    total = tl.load(saved + place, mask=inside, other=0.0).to(tl.float32)
    total += (code - shift * sign) * scale
    row = place // width
    column = place - row * width
    for k in range(rank):
        a = tl.load(left + row * rank + k, mask=inside, other=0.0)
        b = tl.load(right + column * rank + k, mask=inside, other=0).to(tl.float32)
        total += a * b
    tl.store(weight + place, total.to(weight.dtype.element_ty), mask=inside)


def put(weight: Tensor, saved: Tensor, stored: StoredWeight) -> None:
    """Write W + d + L R at the stored positions, summed in float32 and rounded once."""
    factors, count, block = stored.factors, stored.positions.numel(), 256
    assert factors is not None
    left = (factors.left.to(torch.float32) * factors.scales).contiguous()
    grid = (triton.cdiv(count, block),)
    arguments = (stored.positions, stored.codes, left, factors.right.contiguous())
    numbers = (stored.scale, stored.shift, count, weight.shape[-1], factors.rank)
    if count:
        _put[grid](weight, saved, *arguments, *numbers, block=block)
