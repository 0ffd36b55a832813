"""Is a better static merge a better dense expert: for tools that know nothing of experts, and for the experts' bytes?

    python benchmarks/train_experts.py --family strong4 --out experts
    python benchmarks/dense.py --family strong4 --experts experts

Merges the experts with `reference: mean` and with `reference: METHOD` within the same budgets. All merges get the same
few prompts of each task, which tune what is stored, too. Scores and merges in the work folder are used again; rows of
other families, dense experts and budgets in results/dense.json stay.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import record
import torch
from artifacts import (
    CALIBRATION_SEED,
    DTYPE,
    artifact,
    artifact_systems,
    prompt_files,
    source,
    tasks_of,
)
from train_experts import DRAW, FAMILIES, REPORT_SEED

from mergekit_mediator.evaluate.results import DENSE, OWN_EXPERT, ROUTED, normalized, recovered
from mergekit_mediator.evaluate.rivals import Rivals
from mergekit_mediator.evaluate.scorer import Scorer, Tasks
from mergekit_mediator.evaluate.systems import base_system, expert_systems
from mergekit_mediator.models.loading import load_tokenizer

KEY = ("family", "dense", "budget")
# The parts of an artifact that are scored: without experts, with each task's own, and routed.
PARTS = {"dense": DENSE, "own": OWN_EXPERT, "routed": ROUTED}


def rows(
    made: Rivals,
    scorer: Scorer,
    tasks: Tasks,
    prompts: Mapping[str, Path],
    dense: str,
    budgets: list[str],
) -> Iterator[dict[str, Any]]:
    """For each budget: what is kept without experts, with each task's own expert, and routed, in percent.

    `recovered` is the way from the base's log-likelihood of the answers to the experts'.
    """
    base = base_system(scorer, tasks, made.base).scores
    (experts,) = expert_systems(scorer, tasks, made.experts, each=False)
    for budget in budgets:
        label, stored_in = f"{dense} {budget}", {"reference": dense, **storage(budget)}
        model, seconds = artifact(made, label, stored_in, prompts)
        systems = artifact_systems(made, scorer, tasks, label, stored_in, prompts=prompts)
        found = {system.name: system for system in systems}
        row: dict[str, Any] = {
            "dense": dense,
            "budget": budget,
            "merge_cpu_seconds": round(seconds, 1),
        }
        for part, name in PARTS.items():
            scores = found[name].scores
            mean, worst = normalized(scores, experts.scores)
            row |= {f"{part}_mean": round(mean, 1), f"{part}_worst": round(worst, 1)}
            row[f"{part}_recovered"] = round(recovered(scores, base, experts.scores)[0], 2)
        row["bytes_over_base"] = round(found[OWN_EXPERT].figures["total_bytes_over_base"], 4)
        row["routing_accuracy"] = round(found[ROUTED].figures["routing_accuracy"], 3)
        yield {**row, "bits_per_parameter": bits(model)}


def storage(budget: str) -> dict[str, Any]:
    """The parameters of a budget, or of a part of the gain that is to be kept."""
    part = budget.removeprefix("keep ")
    return {"budget": budget} if part == budget else {"keep": float(part)}


def bits(model: Any) -> float:
    """The bits per parameter of the experts' files, the mean of all experts."""
    numel = sum(p.numel() for p in model.model.parameters())
    files = [file.bytes for path, file in model.manifest.files.items() if "/experts/" in path]
    return round(8 * sum(files) / len(files) / numel, 4)


def write(family: str, found: list[dict[str, Any]], about: dict[str, Any]) -> Path:
    """Replace the rows of this family with these dense experts and budgets in results/dense.json."""
    there = record.read("dense") if record.exists("dense") else {"rows": [], "families": {}}
    own = [{"family": family, **row} for row in found]
    new = {tuple(row[key] for key in KEY) for row in own}
    kept = [row for row in there["rows"] if tuple(row[key] for key in KEY) not in new]
    families = {**there["families"], family: about}
    seeds = {"report": REPORT_SEED, "prompts": CALIBRATION_SEED}
    return record.write("dense", {"families": families, "rows": [*kept, *own]}, seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description="Which merge should the dense expert be?")
    parser.add_argument("--family", default="strong4", help=f"{', '.join(FAMILIES)}, or any name")
    parser.add_argument("--tasks", help="folders of --experts, with commas; else those of --family")
    parser.add_argument("--experts", type=Path, default=Path("experts"))
    parser.add_argument("--work", type=Path, help="where merges and scores are kept")
    parser.add_argument("--prompts", type=int, default=64, help="prompts a task in the report")
    parser.add_argument("--asked", type=int, default=16, help="prompts of an expert, for the merge")
    parser.add_argument("--draw", type=int, default=0, help="train_experts' --draw")
    parser.add_argument("--dense", default="mean,regmean_pp", help="with commas")
    parser.add_argument("--budgets", default="1.0595x,1.02x", help="with commas; or `keep 0.99`")
    args = parser.parse_args()
    if not (args.tasks or args.family in FAMILIES):
        parser.error(f"--family {args.family}: --tasks is required")
    torch.set_num_threads(1)
    names = args.tasks.split(",") if args.tasks else FAMILIES[args.family]
    folders = {name: args.experts / name for name in names}
    base = args.experts / "base"
    work = args.work or args.experts / "work" / f"dense-{args.family}"
    work.mkdir(parents=True, exist_ok=True)
    made = Rivals(str(base), {n: source(base, folder) for n, folder in folders.items()}, work)
    tasks = tasks_of(folders, args.prompts, REPORT_SEED + DRAW * args.draw)
    prompts = prompt_files(folders, args.asked, work / "asked", tasks)
    about = {"experts": len(names), "prompts_per_task": args.prompts, "asked": args.asked}
    scorer = Scorer(load_tokenizer(base), work / "scores.json", quiet=True, dtype=DTYPE)
    found: list[dict[str, Any]] = []
    for dense in args.dense.split(","):
        for row in rows(made, scorer, tasks, prompts, dense, args.budgets.split(",")):
            found.append(row)
            print(row, flush=True)
            path = write(args.family, found, about)
    print(path)


if __name__ == "__main__":
    main()
