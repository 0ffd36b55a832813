"""What Mediator is compared with: mergekit's static merges, and low-rank experts."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file

State = dict[str, torch.Tensor]


def static_configs(count: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Static merges of `count` experts: (mergekit's method, parameters) by name.

    The coefficients are those that the methods' papers and mergekit's examples use; the weight
    of each task vector is tried where a method leaves its scale open.
    """
    configs: dict[str, tuple[str, dict[str, Any]]] = {"average": ("linear", {"weight": 1 / count})}
    for weight in (0.3, 0.5, 1.0):
        parameters = {"weight": weight, "normalize": False}
        configs[f"task_arithmetic {weight}"] = ("task_arithmetic", parameters)
    for density in (0.2, 0.5):
        configs[f"ties {density}"] = ("ties", {"weight": 1.0, "density": density})
    for weight in (0.3, 0.5):
        drop = {"weight": weight, "density": 0.5, "normalize": False}
        configs[f"dare_ties {weight}"] = ("dare_ties", drop)
        configs[f"della {weight}"] = ("della", drop | {"epsilon": 0.1})
    return configs


def merge(config: dict[str, Any], base: Path, experts: dict[str, Path], out: Path) -> Path:
    """Merge with mergekit into `out`, unless it is there."""
    if not out.exists():
        mediator = config["merge_method"] == "mediator"
        models = [
            {"model": str(path.resolve()), "parameters": {"expert": name} if mediator else {}}
            for name, path in experts.items()
        ]
        config = {"models": models, "dtype": "float32", "out_dtype": "bfloat16"} | config
        if config["merge_method"] != "linear":
            config["base_model"] = str(base.resolve())
        options = MergeOptions(random_seed=0, write_model_card=False, quiet=True)
        run_merge(MergeConfiguration.model_validate(config), str(out), options)
    return out


def load(folder: Path) -> State:
    """All weights of a checkpoint of one file."""
    return load_file(folder / "model.safetensors")


def size(state: State) -> int:
    """Bytes of the weights as they are stored."""
    return sum(weight.numel() * weight.element_size() for weight in state.values())


def average(states: list[State]) -> State:
    """The plain mean, in bfloat16."""
    return {
        name: (sum(state[name].float() for state in states) / len(states)).to(torch.bfloat16)
        for name in states[0]
    }


class LowRank:
    """Experts as a reference plus the best rank-r form of every matrix's change.

    With the base as the reference this is what mergekit-extract-lora does; with the average it is
    Twin-Merging's shared and exclusive knowledge (arXiv 2406.15479). Changes of vectors (norms) are
    kept whole.
    """

    def __init__(self, reference: State, experts: dict[str, State]) -> None:
        self.reference, self.experts = reference, experts
        self.directions = cache(self._directions)

    def _directions(self, expert: str) -> State:
        """Of every matrix's change the singular vectors of the smaller side, strongest first."""
        directions = {}
        for name, weight in self.experts[expert].items():
            if weight.ndim == 2:
                change = weight.float() - self.reference[name].float()
                change = change if change.shape[0] <= change.shape[1] else change.T
                directions[name] = torch.linalg.eigh(change @ change.T).eigenvectors.flip(1)
        return directions

    def state(self, expert: str, rank: int) -> State:
        """The expert's weights, in bfloat16."""
        state = {}
        for name, weight in self.experts[expert].items():
            start = self.reference[name].float()
            change = weight.float() - start
            if weight.ndim == 2:
                top = self.directions(expert)[name][:, :rank]
                wide = change.shape[0] <= change.shape[1]
                change = top @ (top.T @ change) if wide else (change @ top) @ top.T
            state[name] = (start + change).to(torch.bfloat16)
        return state

    def stored(self, rank: int) -> int:
        """Bytes of all experts, with two bytes a value."""
        values = sum(
            rank * sum(weight.shape) if weight.ndim == 2 else weight.numel()
            for weight in self.reference.values()
        )
        return 2 * values * len(self.experts)
