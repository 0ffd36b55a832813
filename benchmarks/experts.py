"""Which way of merging keeps every specialist, at which size?

    python benchmarks/train_experts.py --family strong4 --out experts
    python benchmarks/experts.py --family strong4 --experts experts

What `mergekit-mediator evaluate OUT --rivals all` does, on experts that are merged here first: every
system on every expert's task, as results/experts-N.json and .png. Static merges are tried with several
coefficients on prompts of another seed, and the best of each method is scored on the prompts of the
report. Scores and merges in the work folder are used again.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import record
import torch
from artifacts import (
    CALIBRATION_PROMPTS,
    CALIBRATION_SEED,
    DTYPE,
    PROMPTS_TUNED_ON,
    TUNE_SEED,
    artifact,
    artifact_systems,
    calibrated,
    prompt_files,
    source,
    tasks_of,
)
from train_experts import DRAW, FAMILIES, REPORT_SEED

from mergekit_mediator import MediatorModel
from mergekit_mediator.cli.plots import plot_quality
from mergekit_mediator.evaluate.results import to_json, to_markdown
from mergekit_mediator.evaluate.rival_systems import RivalSystems
from mergekit_mediator.evaluate.rivals import KNOWN, Rivals, known
from mergekit_mediator.evaluate.scorer import Scorer
from mergekit_mediator.evaluate.systems import (
    base_bytes,
    base_system,
    expert_systems,
    mediator_systems,
    route,
    sizes,
)

# Of the whole directory; weights and routers alone are at most 1.06 and 1.10 of the base's weights then.
FOUR, EIGHT = "1.0595x", "1.099x"
RANKS = (4, 16)
TUNE_PROMPTS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare ways of merging experts.")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="strong4")
    parser.add_argument("--tasks", help="these experts instead, separated by commas")
    parser.add_argument(
        "--experts", type=Path, default=Path("experts"), help="train_experts' --out"
    )
    parser.add_argument("--base", type=Path, help="checkpoint directory of the base model")
    parser.add_argument("--work", type=Path, help="where merges and scores are kept")
    parser.add_argument("--prompts", type=int, default=256, help="prompts a task in the report")
    parser.add_argument("--draw", type=int, default=0, help="train_experts' --draw")
    parser.add_argument("--budget", help="of ours; 1.0595x for up to 4 experts, else 1.099x")
    parser.add_argument("--keep", type=float, help="of ours, instead of a budget")
    parser.add_argument("--values", help="of ours: random_sign or low_rank")
    parser.add_argument(
        "--tuned-on", type=int, default=PROMPTS_TUNED_ON, help="prompts of each task; 0: untuned"
    )
    parser.add_argument("--calibrated", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--rivals", default="all", help=f"of {', '.join(KNOWN)}, with commas; empty: none"
    )
    parser.add_argument("--each", action="store_true", help="every expert on every task")
    parser.add_argument("--name", help="of the results file; experts-N unless given")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = args.tasks.split(",") if args.tasks else FAMILIES[args.family]
    base = args.base or args.experts / "base"
    folders = {name: args.experts / name for name in names}
    experts = {name: source(base, folder) for name, folder in folders.items()}
    work = args.work or args.experts / "work" / f"{len(names)}"
    report_seed = REPORT_SEED + DRAW * args.draw
    tasks = tasks_of(folders, args.prompts, report_seed)
    tuning = tasks_of(folders, TUNE_PROMPTS, TUNE_SEED)
    stored_in: dict[str, Any] = {"budget": args.budget or (FOUR if len(names) <= 4 else EIGHT)}
    label = "mediator"
    if args.keep:
        stored_in, label = {"keep": args.keep}, f"mediator keep {args.keep}"
    if args.values:
        stored_in["values"], label = args.values, f"{label} {args.values}"
    made = Rivals(str(base), experts, work)
    model, _ = artifact(made, label, stored_in)
    scorer = Scorer(model.tokenizer, work / "scores.json", dtype=DTYPE)
    routing = route(model, tasks)
    results = [
        base_system(scorer, tasks, made.base),
        *expert_systems(scorer, tasks, made.experts, args.each),
        *artifact_systems(made, scorer, tasks, label, stored_in, routing),
    ]
    if args.tuned_on:
        prompts = prompt_files(folders, args.tuned_on, work / "mediator-tuned", tasks)
        # what routes without data is measured before anything is stored, so that tuning changes nothing of it
        tuned = artifact_systems(made, scorer, tasks, f"{label} tuned", stored_in, routing, prompts)
        results += [
            replace(row, name=row.name.replace("mediator", "mediator_tuned"))
            for row in tuned
            if row.name != "mediator_dense"
        ]
    found = {"routing": routing}
    if args.calibrated:
        informed = calibrated(model, folders, work / "mediator-calibrated", tasks)
        found["routing_calibrated"] = route(informed, tasks)
        stored = sizes(MediatorModel.from_pretrained(informed.root))
        *_, routed = mediator_systems(informed, scorer, tasks, found["routing_calibrated"], stored)
        results.append(replace(routed, name="mediator_calibrated"))
    rivals = RivalSystems(made, scorer, tasks, tuning, routing, base_bytes(model))
    results += rivals.score(known(args.rivals.split(",")), RANKS)
    rows = to_json(results)
    name = args.name or f"experts-{len(names)}"
    figures = {
        "tasks": {task: len(t.examples) for task, t in tasks.items()},
        "tuning_prompts_per_task": TUNE_PROMPTS,
        "calibration_prompts_per_task": CALIBRATION_PROMPTS,
        "prompts_tuned_on_per_task": args.tuned_on,
        "systems": rows,
        **{
            name: {task: one.figures(model.experts) for task, one in by_task.items()}
            for name, by_task in found.items()
        },
    }
    seeds = {"report": report_seed, "tune": TUNE_SEED, "calibration": CALIBRATION_SEED}
    path = record.write(name, figures, seeds)
    plot_quality(rows, path.with_suffix(".png"))
    print(f"{to_markdown(rows)}\nwritten to {path}")


if __name__ == "__main__":
    main()
