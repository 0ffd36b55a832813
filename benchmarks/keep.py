"""Does an expert keep the part of its gain that `keep` predicts?

    python benchmarks/keep.py --base BASE --experts experts --tasks A,B,C --family strong [--values random_sign]

Every expert is stored in the fewest bytes at which it is predicted to keep each part, from its weights alone.
`measured` is the way from the average (0) to the expert (1) that the stored expert goes, in nats per answer
token on held-out prompts of its own task; `over_base` is the way from the base. Results are added to results/keep.json, family by family.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import record
import torch
from codec import Family, State
from torch import Tensor
from train_experts import REPORT_SEED

from mergekit_mediator.delta.allocation import Allocation
from mergekit_mediator.delta.approximate import approximate, as_matrix, is_vector
from mergekit_mediator.delta.decomposition import decompose
from mergekit_mediator.delta.factors import Components, squared_norm
from mergekit_mediator.delta.loss_law import LEFT_OUT, NOISE
from mergekit_mediator.delta.mixing import mix_
from mergekit_mediator.delta.random_sign import encode_random_sign
from mergekit_mediator.delta.random_sign_costs import density_at, random_sign_tradeoff
from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.delta.tradeoff import tradeoff
from mergekit_mediator.store.codec import encode_bytes

KEEP = (0.9, 0.97, 0.99, 0.999)


class Stored:
    """One expert with the costs and the decompositions of its weights."""

    law = LEFT_OUT

    def __init__(self, family: Family, task: str) -> None:
        self.family, self.task = family, task
        self.components: dict[str, Components | None] = {}
        costs = torch.stack([self.costs(name) for name in family.base]).sum(dim=0)
        self.allocation = Allocation([costs], laws=[self.law])

    def costs(self, name: str) -> Tensor:
        tau = self.family.difference(self.task, name)
        known = None if is_vector(tau) else decompose(as_matrix(tau)).storable()
        self.components[name] = known
        return tradeoff(tau, known, squared_norm(self.family.base[name]))

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


class StoredAsSigns(Stored):
    """One expert as random signs."""

    law = NOISE

    def costs(self, name: str) -> Tensor:
        square = squared_norm(self.family.base[name])
        return random_sign_tradeoff(self.family.difference(self.task, name), square)

    def form(self, name: str, slope: float) -> StoredWeight:
        expert, base = self.family.experts[self.task][name], self.family.base[name]
        density = density_at(self.family.difference(self.task, name), slope)
        return encode_random_sign(expert, base, density)


# By `values`; none stands for low rank plus sparse.
FORMS: dict[str, type[Stored]] = {"": Stored, "random_sign": StoredAsSigns}


def rows(family: Family, task: str, name: str, values: str) -> list[dict[str, Any]]:
    """One row for each `keep` of one expert that the form can keep."""
    figure = "answer_log_likelihood"
    best = getattr(family.score(task, family.experts[task]), figure)
    least, base = (
        getattr(family.score(task, state), figure) for state in (family.mean, family.base)
    )
    stored = FORMS[values](family, task)
    result = []
    for keep in KEEP:
        (slope,) = stored.allocation.slopes_to_keep([keep])
        (predicted,) = stored.allocation.kept([slope])
        if predicted < keep:
            break
        bits, state = stored.at(slope)
        reached = getattr(family.score(task, state), figure)
        row = {
            "family": name,
            "expert": task,
            "values": values,
            "keep": keep,
            "predicted": round(predicted, 5),
            "measured": round((reached - least) / (best - least), 5),
            "over_base": round((reached - base) / (best - base), 5),
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
    parser.add_argument("--values", choices=list(FORMS), default="", help="the form")
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
    replaced = {(args.family, task, args.values) for task in measured}
    others = [r for r in kept if (r["family"], r["expert"], r["values"]) not in replaced]
    new: list[dict[str, Any]] = []
    for task in measured:
        new += rows(family, task, args.family, args.values)
        record.write(
            "keep", {"prompts": args.prompts, "rows": others + new}, {"prompts": args.seed}
        )


if __name__ == "__main__":
    main()
