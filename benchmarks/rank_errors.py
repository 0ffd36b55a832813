"""Where the error of an exported rank comes from: the rank, or the form in which the expert is stored.

    python benchmarks/rank_errors.py BASE --experts DIR --tasks A,B

For matrices of a few layers: the part of the squared change of the fine-tune that is left out by the form of some bits
a parameter, by adapters of a rank of what is stored, and by the best adapters of this rank of the fine-tune itself,
which `mergekit-extract-lora` takes (Eckart and Young). The rows go to results/serving.json, beside those of other
experts. About twenty seconds an expert.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import record
import torch
from safetensors import safe_open
from torch import Tensor

from mergekit_mediator.delta.approximate import approximate
from mergekit_mediator.delta.tradeoff import slope_for, tradeoff

BITS = (0.15, 0.5)
RANKS = (16, 64)
# The matrices: their layers, as parts of the number of layers, and their modules.
_PLACES = (0.1, 0.5, 0.9)
_MODULES = ("q_proj", "o_proj", "gate_proj", "down_proj")


def changes(base: Path, expert: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The base's matrices of a few layers, and their changes, float32."""
    with (
        safe_open(base / "model.safetensors", "pt") as before,
        safe_open(expert / "model.safetensors", "pt") as after,
    ):
        names = [name for name in before.keys() if "_proj.weight" in name]  # noqa: SIM118
        count = 1 + max(int(name.split(".")[2]) for name in names)
        layers = {str(int(place * count)) for place in _PLACES}
        names = [n for n in names if n.split(".")[2] in layers and n.split(".")[-2] in _MODULES]
        chosen = {n: before.get_tensor(n) for n in names}
        return chosen, {n: after.get_tensor(n).float() - w.float() for n, w in chosen.items()}


def rows(base: Mapping[str, Tensor], taus: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """For each number of bits: the parts of the squared change that are left out."""
    norm = sum(float(tau.square().sum()) for tau in taus.values())
    best = dict.fromkeys(RANKS, 0.0)
    for tau in taus.values():
        squares = torch.linalg.svdvals(tau).square()
        for rank in RANKS:
            best[rank] += float(squares[rank:].sum())
    costs = sum((tradeoff(tau)[0] for tau in taus.values()), torch.zeros(()))
    numel = sum(tau.numel() for tau in taus.values())
    result = []
    for bits in BITS:
        slope = slope_for(costs, numel, bits)
        stored, adapters = 0.0, dict.fromkeys(RANKS, 0.0)
        for name, tau in taus.items():
            change = approximate(tau, slope, torch.bfloat16, 0.0).change(base[name]).float()
            stored += float((tau - change).square().sum())
            u, s, vh = torch.linalg.svd(change, full_matrices=False)
            for rank in RANKS:
                adapter = (u[:, :rank] * s[:rank]) @ vh[:rank]
                adapters[rank] += float((tau - adapter).square().sum())
        row: dict[str, Any] = {"bits": bits, "stored": stored / norm}
        for rank in RANKS:
            row |= {f"adapter_{rank}": adapters[rank] / norm, f"best_{rank}": best[rank] / norm}
        result.append(row)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path)
    parser.add_argument("--experts", type=Path, required=True)
    parser.add_argument("--tasks", required=True, help="folders of --experts, with commas")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    there = record.read("serving").get("rank_errors", [])
    figures = [row for row in there if row["expert"] not in arguments.tasks.split(",")]
    for task in arguments.tasks.split(","):
        base, taus = changes(arguments.base, arguments.experts / task)
        figures += [{"expert": task, "matrices": len(taus), **row} for row in rows(base, taus)]
        print(figures[-len(BITS) :], flush=True)
    print(record.amend("serving", "errors of ranks", {"rank_errors": figures}))


if __name__ == "__main__":
    main()
