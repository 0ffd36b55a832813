"""What of a model a fine-tuning may change: a share of its numbers, or an adapter on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SEED = 7


def masks(model: Any, share: float) -> dict[str, Tensor]:
    """Which parameters may change, by name; nothing if all may."""
    draw = torch.Generator().manual_seed(SEED)
    return {
        name: (torch.rand(p.shape, generator=draw) < share).to(p.device)
        for name, p in model.named_parameters()
        if share < 1
    }


def change_a_share(model: Any, share: float) -> None:
    """Let training change this share of the numbers of each weight, as reinforcement learning leaves the others."""
    parameters = dict(model.named_parameters())
    for name, mask in masks(model, share).items():
        if parameters[name].requires_grad:
            parameters[name].register_hook(mask.mul)


def with_adapter(model: Any, rank: int) -> Any:
    """Put an adapter of this rank on every linear layer but the head, which is all that training changes then.

    The layers of `model` are changed in place, so that it computes with the adapter.
    """
    from peft import LoraConfig, get_peft_model  # here, for benchmarks without adapters

    torch.manual_seed(SEED)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(model, config)
