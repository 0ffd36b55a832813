"""How much of each expert's skill every static merge method keeps.

    python benchmarks/train_experts.py --family strong4 --out experts
    python benchmarks/method_quality.py --family strong4 --experts experts [--method NAME]...

Every method merges the family with two or three usual coefficients; those that do best on prompts of another seed
are scored on the prompts of the report. Methods that need prompts get others again; `rcp` keeps the first expert
whole. Those that store experts are routed. Trials that differ in a factor of the merged task vector alone are made of
one merge in float32. Rows of these methods and of the family in results/methods.json are replaced, and all others
stay; name `ties` too, or times are set against those of the last run with it. Experts that were trained anew are
others: give them a --label, because rows of one table are compared. Merges and scores in the work folder are used
again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mergekit.merge_methods  # noqa: F401 (before the package, so that the start-up hook completes it)
import record
import torch
from artifacts import CALIBRATION_SEED, DTYPE, TUNE_SEED, prompt_files, source, tasks_of
from method_artifacts import STORED, stored
from train_experts import FAMILIES, REPORT_SEED

from mergekit_mediator.evaluate.contenders import Contender, adapted, checkpoint
from mergekit_mediator.evaluate.results import DENSE, OWN_EXPERT, ROUTED, Score, normalized
from mergekit_mediator.evaluate.rivals import Rivals
from mergekit_mediator.evaluate.scorer import Scorer, Tasks
from mergekit_mediator.evaluate.static_methods import SCALES, STATIC, StaticMethod
from mergekit_mediator.evaluate.systems import mediator_systems
from mergekit_mediator.evaluate.trials import Trial, trials
from mergekit_mediator.models.loading import load_tokenizer
from mergekit_mediator.models.prompt_files import read_prompts

RCP, PENALTIES = "rcp", (1.0, 100.0)
OWN_TEXTS = 32  # that an expert writes, in place of prompts of its task
# Tried as `evaluate` tries them, and those that are no rivals there.
TRIALS: dict[str, StaticMethod] = {
    **STATIC,
    "fisher": StaticMethod("fisher", factors=(1.0, 2.0), needs_prompts=True),
    "widen": StaticMethod("widen", factors=(0.5, 1.0)),
    "localize_and_stitch": StaticMethod(
        "localize_and_stitch", tuple({"density": d} for d in (0.05, 0.2))
    ),
    "doge": StaticMethod("doge", tuple({"norm": 0.5, "density": d} for d in (0.3, 1.0)), SCALES),
    "regmean_pp_own_texts": StaticMethod(
        "regmean_pp", ({"prompts": OWN_TEXTS},), STATIC["regmean_pp"].factors
    ),
    "expert_merging": StaticMethod("expert_merging", factors=(1.0, 2.0), needs_prompts=True),
    # of adapters; it writes one
    "lora_lego": StaticMethod("lora_lego", tuple({"lambda": x} for x in (0.5, 1.0, 2.0))),
}


def merges(made: Rivals, method: str, files: Mapping[str, Path], reasoning: str) -> Iterator[Trial]:
    """The merges by one method, with each choice of coefficients; `rcp` keeps the reasoning expert whole."""
    if method != RCP:
        asked = {name: read_prompts(file) for name, file in files.items()}
        yield from trials(made, method, TRIALS[method], asked)
        return
    for penalty in PENALTIES:
        of_model = {n: {"prompts": str(f), "reasoning": n == reasoning} for n, f in files.items()}
        config = {
            "merge_method": RCP,
            "base_model": made.base,
            "models": [{"model": m, "parameters": of_model[n]} for n, m in made.experts.items()],
            "parameters": {"penalty": penalty},
            "dtype": "float32",
            "out_dtype": "bfloat16",
        }
        yield Trial(f"{RCP} penalty {penalty}", *made.merged(config, f"{RCP}-{penalty}"))


def row(
    method: str,
    made: Rivals,
    files: Mapping[str, Path],
    scorer: Scorer,
    report: tuple[Tasks, dict[str, Score]],
    tuning: tuple[Tasks, dict[str, Score]],
) -> dict[str, Any]:
    """Merge with each choice of coefficients, and score the best one on the prompts of the report."""
    tried = []
    for trial in merges(made, method, files, next(iter(files))):
        scores = scorer.alike(f"{trial.label}, tuning", tuning[0], answering(made, trial))
        tried.append((normalized(scores, tuning[1])[0], trial))
    _, chosen = max(tried, key=lambda scored: scored[0])
    scores = scorer.alike(f"{method}, report", report[0], answering(made, chosen))
    mean, worst = normalized(scores, report[1])
    return {
        "method": method,
        "normalized_mean": round(mean, 1),
        "normalized_worst": round(worst, 1),
        "coefficients": chosen.label.removeprefix(method).strip(),
        "tried": len(tried),
        "merge_cpu_seconds": round(chosen.seconds, 1),
    }


def stored_row(
    name: str,
    made: Rivals,
    files: Mapping[str, Path],
    scorer: Scorer,
    report: tuple[Tasks, dict[str, Score]],
) -> dict[str, Any]:
    """Merge into an artifact, and score it routed as it routes without data."""
    model, figures = stored(made, name, files)
    found = {system.name: system.scores for system in mediator_systems(model, scorer, report[0])}
    row: dict[str, Any] = {"method": name}
    for part, system in {"normalized": ROUTED, "own": OWN_EXPERT, "dense": DENSE}.items():
        mean, worst = normalized(found[system], report[1])
        row |= {f"{part}_mean": round(mean, 1), f"{part}_worst": round(worst, 1)}
    return {**row, **figures}


def answering(made: Rivals, trial: Trial) -> Contender:
    """The merged checkpoint, or the base with the merged adapter."""
    adapter = (trial.folder / "adapter_config.json").exists()
    return adapted(made.base, trial.folder) if adapter else checkpoint(trial.folder)


def write(family: str, rows: list[dict[str, Any]], figures: dict[str, Any]) -> Path:
    """Replace the rows of these methods and of this family in results/methods.json; all others stay.

    How the rows of earlier runs were made stays beside the last run, under `earlier`.
    """
    content = record.read("methods")
    measured = {row["method"] for row in rows}
    known = [
        r
        for r in content["rows"]
        if (r["family"], r["method"]) not in {(family, m) for m in measured}
    ]
    both = [*rows, *(row for row in known if row["family"] == family)]
    ties = next((row["merge_cpu_seconds"] for row in both if row["method"] == "ties"), None)
    for own in rows:
        times = round(own["merge_cpu_seconds"] / ties, 2) if ties else None
        known.append({"family": family, **own, "time_over_ties": times})
    content["rows"] = known
    quality = content.setdefault("quality", {})
    before = quality.get(family)
    if before is not None and before["command"] != figures["command"]:
        figures = {**figures, "earlier": [*before.pop("earlier", []), before]}
    elif before is not None and "earlier" in before:
        figures = {**figures, "earlier": before["earlier"]}
    quality[family] = figures
    return record.replace("methods", content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", default="strong4", help=f"{', '.join(FAMILIES)}, or any name")
    parser.add_argument("--tasks", help="folders of --experts, with commas; else those of --family")
    parser.add_argument(
        "--label", help="what to call the experts in the results; --family unless given"
    )
    parser.add_argument("--experts", type=Path, default=Path("experts"))
    parser.add_argument("--work", type=Path, help="where merges and scores are kept")
    parser.add_argument("--prompts", type=int, default=64, help="prompts a task in the report")
    parser.add_argument("--tuning-prompts", type=int, default=8)
    parser.add_argument("--asked", type=int, default=16, help="prompts of an expert, for methods")
    parser.add_argument("--method", action="append", choices=[*TRIALS, RCP, *STORED])
    args = parser.parse_args()
    if not (args.tasks or args.family in FAMILIES):
        parser.error(f"--family {args.family}: --tasks is required")
    torch.set_num_threads(1)
    names = args.tasks.split(",") if args.tasks else FAMILIES[args.family]
    base = args.experts / "base"
    folders = {name: args.experts / name for name in names}
    work = args.work or args.experts / "work" / f"methods-{args.family}"
    work.mkdir(parents=True, exist_ok=True)
    made = Rivals(str(base), {n: source(base, folder) for n, folder in folders.items()}, work)
    scorer = Scorer(load_tokenizer(base), work / "scores.json", quiet=True, dtype=DTYPE)

    def measured(prompts: int, seed: int, name: str) -> tuple[Tasks, dict[str, Score]]:
        tasks = tasks_of(folders, prompts, seed)
        own = {n: [checkpoint(made.experts[n])] * len(t.examples) for n, t in tasks.items()}
        return tasks, scorer.score(f"experts, {name}", tasks, own)

    report = measured(args.prompts, REPORT_SEED, "report")
    tuning = measured(args.tuning_prompts, TUNE_SEED, "tuning")
    files = prompt_files(folders, args.asked, work / "asked", dict(report[0]))
    how = record.made({"report": REPORT_SEED, "tune": TUNE_SEED, "prompts": CALIBRATION_SEED})
    how |= {"prompts_per_task": args.prompts, "tuning_prompts_per_task": args.tuning_prompts}
    how |= {"prompts_of_methods": args.asked, "experts": len(names)}
    rows: list[dict[str, Any]] = []
    full = not any((folder / "adapter_config.json").exists() for folder in folders.values())
    of_full_models = [method for method in TRIALS if not (full and method == "lora_lego")]
    for method in args.method or [*of_full_models, RCP, *STORED]:
        rows.append(
            stored_row(method, made, files, scorer, report)
            if method in STORED
            else row(method, made, files, scorer, report, tuning)
        )
        print(rows[-1], flush=True)
        path = write(args.label or args.family, rows, how)
    print(path)


if __name__ == "__main__":
    main()
