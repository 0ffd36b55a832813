"""The weights of whole checkpoints, and their mean."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

State = dict[str, torch.Tensor]


def load(folder: Path) -> State:
    """All weights of a checkpoint of one file."""
    return load_file(folder / "model.safetensors")


def average(states: list[State]) -> State:
    """The plain mean, in bfloat16."""
    return {
        name: (sum(state[name].float() for state in states) / len(states)).to(torch.bfloat16)
        for name in states[0]
    }
