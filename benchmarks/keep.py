"""Does an expert keep the part of its gain that `keep` predicts?

    python benchmarks/keep.py --base BASE --experts experts --tasks A,B,C --family strong

Every expert is stored in the fewest bytes at which it is predicted to keep each part, from its weights alone.
`measured` is the way from the average (0) to the expert (1) that the stored expert goes, in nats per answer
token on held-out prompts of its own task. Results are added to results/keep.json, family by family.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import record
import torch
from codec import Family, State
from train_experts import REPORT_SEED

from mergekit_mediator.delta.allocation import Allocation
from mergekit_mediator.delta.approximate import approximate, as_matrix, is_vector
from mergekit_mediator.delta.decomposition import decompose
from mergekit_mediator.delta.mixing import mix_
from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.delta.tradeoff import tradeoff
from mergekit_mediator.store.codec import encode_bytes

KEEP = (0.9, 0.97, 0.99, 0.999)


class Stored:
    """One expert with the costs and the decompositions of its weights."""

    def __init__(self, family: Family, task: str) -> None:
        self.family, self.task = family, task
        self.components, costs = {}, 0
        for name in family.base:
            tau = family.difference(task, name)
            known = None if is_vector(tau) else decompose(as_matrix(tau)).storable()
            self.components[name] = known
            costs = costs + tradeoff(tau, known)
        self.allocation = Allocation([costs])

    def at(self, slope: float) -> tuple[float, State]:
        """Bits per parameter and the weights of the stored expert, on the base."""
        bits, state = 0, {}
        for name, weight in self.family.base.items():
            stored = self.form(name, slope)
            bits += 8 * encode_bytes(stored, weight)[0].numel()
            state[name] = weight.clone()
            mix_(state[name], [(1.0, stored)])
        return bits / self.family.numel, state

    def form(self, name: str, slope: float) -> StoredWeight:
        tau, dtype = self.family.difference(self.task, name), self.family.base[name].dtype
        return approximate(tau, slope, dtype, 0.0, self.components[name])


def rows(family: Family, task: str, name: str) -> list[dict[str, Any]]:
    """One row for each `keep` of one expert."""
    figure = "answer_log_likelihood"
    best = getattr(family.score(task, family.experts[task]), figure)
    least = getattr(family.score(task, family.mean), figure)
    stored = Stored(family, task)
    result = []
    for keep in KEEP:
        (slope,) = stored.allocation.slopes_to_keep([keep])
        (predicted,) = stored.allocation.kept([slope])
        bits, state = stored.at(slope)
        measured = (getattr(family.score(task, state), figure) - least) / (best - least)
        row = {
            "family": name,
            "expert": task,
            "keep": keep,
            "predicted": round(predicted, 5),
            "measured": round(measured, 5),
            "bits_per_parameter": round(bits, 4),
        }
        print(row, flush=True)
        result.append(row)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--experts", type=Path, required=True)
    parser.add_argument("--tasks", required=True, help="folders of experts, separated by commas")
    parser.add_argument("--family", required=True, help="what to call these experts")
    parser.add_argument("--only", default="", help="measure these experts, separated by commas")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seed", type=int, default=REPORT_SEED)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    family = Family(args.base, args.experts, args.tasks.split(","), args.prompts, args.seed)
    path = record.RESULTS / "keep.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    measured = args.only.split(",") if args.only else family.tasks
    others = [r for r in kept if r["family"] != args.family or r["expert"] not in measured]
    new: list[dict[str, Any]] = []
    for task in measured:
        new += rows(family, task, args.family)
        record.write(
            "keep", {"prompts": args.prompts, "rows": others + new}, {"prompts": args.seed}
        )


if __name__ == "__main__":
    main()
