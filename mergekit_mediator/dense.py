"""The dense expert: the weighted mean of the task vectors on top of the base, in float32 chunk by chunk."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_mediator.threshold import chunks
from mergekit_mediator.workers import Map


def average(
    base: Tensor,
    experts: Sequence[Tensor],
    shares: Sequence[float],
    scale: float,
    dtype: torch.dtype,
    device: str = "cpu",
    over: Map = map,
) -> Tensor:
    """θ_0 + λ · Σ_t w_t (θ_t − θ_0) / Σ_t w_t, summed in float32 and rounded once.

    Args:
        base: any shape, any floating dtype.
        experts: tensors of the base's shape.
        shares: w_t, with a positive sum.
        scale: λ; 1 gives the weighted mean of the experts.
        dtype: of the result.
        device: where the arithmetic is done; the result is where the base is.
        over: what runs the independent parts; see `workers`.
    """
    flat_base, flat_experts = base.reshape(-1), [e.reshape(-1) for e in experts]
    total = sum(shares)
    result = torch.empty(base.shape, dtype=dtype, device=base.device)
    flat_result = result.view(-1)

    def average_chunk(part: slice) -> None:
        reference = flat_base[part].to(device, torch.float32)
        merged = reference.clone()
        for expert, share in zip(flat_experts, shares, strict=True):
            tau = expert[part].to(device, torch.float32) - reference
            merged.add_(tau, alpha=scale * share / total)
        flat_result[part] = merged.to(dtype)

    for _ in over(average_chunk, chunks(base.numel())):
        pass
    return result
