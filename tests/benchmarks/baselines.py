"""What Mediator is compared with: mergekit's static merges, and low-rank remainders."""

from __future__ import annotations

from collections.abc import Iterator
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
        parameters = {"weight": 1.0, "density": density}
        configs[f"ties {density}"] = ("ties", parameters)
        for method in ("dare_ties", "della"):
            parameters = {"weight": 0.5, "density": density, "normalize": False}
            if method == "della":
                parameters["epsilon"] = 0.1
            configs[f"{method} {density}"] = (method, parameters)
    return configs


def static_merge(
    method: str, parameters: dict[str, Any], base: Path, experts: list[Path], out: Path
) -> State:
    """Merge with mergekit itself into `out`, unless it is there, and load the result."""
    weights = out / "model.safetensors"
    if not weights.exists():
        config: dict[str, Any] = {
            "merge_method": method,
            "models": [{"model": str(path.resolve())} for path in experts],
            "parameters": parameters,
            "dtype": "float32",
            "out_dtype": "bfloat16",
        }
        if method != "linear":
            config["base_model"] = str(base.resolve())
        options = MergeOptions(random_seed=0, write_model_card=False, quiet=True)
        run_merge(MergeConfiguration.model_validate(config), str(out), options)
    return load_file(weights)


def left_directions(expert: State, reference: State) -> State:
    """For every matrix of the model the left singular vectors of its change, strongest first.

    Taken from the eigenvectors of the smaller Gram matrix; a vector's change is not factored.
    """
    directions = {}
    for name, weight in expert.items():
        if weight.ndim == 2:
            change = weight.float() - reference[name].float()
            change = change if change.shape[0] <= change.shape[1] else change.T
            directions[name] = torch.linalg.eigh(change @ change.T).eigenvectors.flip(1)
    return directions


def low_rank(expert: State, reference: State, directions: State, rank: int) -> tuple[State, int]:
    """The reference plus the best rank-`rank` form of every matrix's change, and its bytes.

    Factors count two bytes a value, and changes of vectors (norms) are kept whole. Rank-r
    extraction of adapters from fine-tunes (mergekit-extract-lora) where the reference is the
    base; Twin-Merging's exclusive knowledge (arXiv 2406.15479) where it is the shared merge.
    """
    state, stored = {}, 0
    for name, weight in expert.items():
        start = reference[name].float()
        change = weight.float() - start
        if name in directions:
            top = directions[name][:, :rank]
            wide = change.shape[0] <= change.shape[1]
            change = top @ (top.T @ change) if wide else (change @ top) @ top.T
            stored += 2 * rank * sum(change.shape)
        else:
            stored += 2 * change.numel()
        state[name] = (start + change).to(torch.bfloat16)
    return state, stored


def size(state: State) -> int:
    """Bytes of the weights as they are stored."""
    return sum(weight.numel() * weight.element_size() for weight in state.values())


def remainders(
    expert: State, references: dict[str, State], ranks: tuple[int, ...]
) -> Iterator[tuple[str, State, int]]:
    """(name, weights, bytes of the expert) for every reference and rank."""
    for label, reference in references.items():
        directions = left_directions(expert, reference)
        for rank in ranks:
            state, stored = low_rank(expert, reference, directions, rank)
            yield f"{label} {rank}", state, stored
