"""The weights of whole checkpoints and of adapters, and their mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mergekit_mediator.merge.adapters.lora import read_adapter

State = dict[str, torch.Tensor]


def load(folder: Path) -> State:
    """All weights of a checkpoint of one file."""
    return load_file(folder / "model.safetensors")


def expert(base: State, folder: Path) -> State:
    """All weights of a fine-tune: its own checkpoint, or the base with its adapter in it, in float32 where it is."""
    if (folder / "model.safetensors").exists():
        return load(folder)
    factors = read_adapter(folder) or {}
    return {
        name: weight.float() + factors[name].product() if name in factors else weight
        for name, weight in base.items()
    }


def task_config(folder: Path) -> dict[str, Any]:
    """What the problems of an expert's task are drawn from, as written beside the expert."""
    notes = [path for path in (folder / "expert.json", folder / "zoo.json") if path.exists()]
    config: dict[str, Any] = json.loads(notes[0].read_text())["config"]
    return config


def average(states: list[State]) -> State:
    """The plain mean, in bfloat16."""
    return {
        name: torch.stack([state[name].float() for state in states]).mean(dim=0).to(torch.bfloat16)
        for name in states[0]
    }
