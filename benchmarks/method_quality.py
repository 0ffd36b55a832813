"""How much of each expert's skill every static merge method keeps.

    python benchmarks/train_experts.py --family strong4 --out experts
    python benchmarks/method_quality.py --family strong4 --experts experts [--method NAME]...

Every method merges the family with two or three usual coefficients; those that do best on prompts of another seed
are scored on the prompts of the report. Methods that need prompts get others again. Trials that differ in a factor of
the merged task vector alone are made of one merge in float32. Rows of the family in results/methods.json are replaced,
and all others stay. Merges and scores in the work folder are used again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import mergekit.merge_methods  # noqa: F401 (before the package, so that the start-up hook completes it)
import record
import torch
from artifacts import CALIBRATION_SEED, DTYPE, TUNE_SEED, prompt_files, source, tasks_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from train_experts import FAMILIES, REPORT_SEED

from mergekit_mediator.evaluate.contenders import checkpoint
from mergekit_mediator.evaluate.results import Score, normalized
from mergekit_mediator.evaluate.rivals import STATIC, Rivals, described
from mergekit_mediator.evaluate.scorer import Scorer, Tasks
from mergekit_mediator.methods.with_prompts import WITH_PROMPTS
from mergekit_mediator.models.loading import load_tokenizer

SCALES = (0.5, 1.0, 1.5)
# By method: the parameters of each merge, and the factors of its task vector that are tried.
TRIALS: dict[str, tuple[tuple[dict[str, Any], ...], tuple[float, ...]]] = {
    "average": (({"weight": 1.0},), (1.0,)),
    "task_arithmetic": (({"weight": 1.0, "normalize": False},), (0.3, 0.5, 1.0)),
    "ties": (STATIC["ties"][1], (1.0, 1.5)),
    "tsvm": (({},), SCALES),
    "iso_c": (({},), SCALES),
    "wudi": (({},), (1.0, 1.5)),
    "fisher": (({},), (1.0, 2.0)),
    "regmean_pp": (({},), (1.0, 1.5)),
    "widen": (({},), (0.5, 1.0)),
    "pcb": (({"density": 0.1}, {"density": 0.2}), (1.2,)),
    "localize_and_stitch": (({"density": 0.05}, {"density": 0.2}), (1.0,)),
    "dare_ties": (({"weight": 1.0, "density": 0.5, "normalize": False},), (0.3, 0.5)),
    "della": (
        ({"weight": 1.0, "density": 0.5, "epsilon": 0.1, "normalize": False},),
        (0.3, 0.5),
    ),
    "opcm": (({},), SCALES),
    "r_tsvm": (({},), SCALES),
    "doge": (({"norm": 0.5},), SCALES),
    "expert_merging": (({},), (1.0, 2.0)),
}
ASKED = {method.spec.name for method in WITH_PROMPTS}


def configuration(
    method: str, made: Rivals, prompts: dict[str, Path], coefficients: dict[str, Any]
) -> dict[str, Any]:
    """A merge of all experts by one method."""
    models: list[dict[str, Any]] = [{"model": place} for place in made.experts.values()]
    if method in ASKED:
        for entry, name in zip(models, made.experts, strict=True):
            entry["parameters"] = {"prompts": str(prompts[name])}
    config = {
        "merge_method": STATIC[method][0] if method in STATIC else method,
        "models": models,
        "parameters": coefficients,
        "dtype": "float32",
        "out_dtype": "float32",
    }
    return config if method == "average" else {**config, "base_model": made.base}


def scaled(merged: Path, base: Path, factor: float) -> Path:
    """A checkpoint in bfloat16 with `factor` times the merged task vector, beside the merge."""
    out = merged.with_name(f"{merged.name}-times-{factor}")
    if (out / "model.safetensors").exists():
        return out
    shutil.copytree(merged, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((out / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = "bfloat16"
    (out / "config.json").write_text(json.dumps(config, indent=2))
    weights = {}
    with safe_open(base / "model.safetensors", framework="pt") as start:
        for shard in sorted(merged.glob("*.safetensors")):
            for name, weight in load_file(shard).items():
                zero = start.get_tensor(name).float()
                weights[name] = (zero + factor * (weight - zero)).bfloat16()
    save_file(weights, out / "partial.safetensors", {"format": "pt"})
    (out / "partial.safetensors").rename(out / "model.safetensors")
    return out


def row(
    method: str,
    made: Rivals,
    prompts: dict[str, Path],
    scorer: Scorer,
    report: tuple[Tasks, dict[str, Score]],
    tuning: tuple[Tasks, dict[str, Score]],
) -> dict[str, Any]:
    """Merge with each choice of coefficients, and score the best one on the prompts of the report."""
    tried = []
    merges, factors = TRIALS[method]
    for parameters in merges:
        config = configuration(method, made, prompts, parameters)
        label = described(method, parameters)
        folder, seconds = made.merged(config, label.replace(" ", "-"))
        for factor in factors:
            checkpoints = scaled(folder, Path(made.base), factor)
            scores = scorer.alike(f"{label}, tuning", tuning[0], checkpoint(checkpoints))
            density = f"density {parameters['density']}, " if len(merges) > 1 else ""
            coefficients = f"{density}times {factor}"
            tried.append((normalized(scores, tuning[1])[0], coefficients, checkpoints, seconds))
    _, coefficients, folder, seconds = max(tried)
    scores = scorer.alike(f"{method}, report", report[0], checkpoint(folder))
    mean, worst = normalized(scores, report[1])
    return {
        "method": method,
        "normalized_mean": round(mean, 1),
        "normalized_worst": round(worst, 1),
        "coefficients": coefficients,
        "tried": len(tried),
        "merge_cpu_seconds": round(seconds, 1),
    }


def write(family: str, rows: list[dict[str, Any]], figures: dict[str, Any]) -> Path:
    """Replace the rows of one family in results/methods.json, with how they were made beside them."""
    content = record.read("methods")
    others = [r for r in content["rows"] if r["family"] != family]
    ties = next((r["merge_cpu_seconds"] for r in rows if r["method"] == "ties"), None)
    for own in rows:
        times = round(own["merge_cpu_seconds"] / ties, 2) if ties else None
        others.append({"family": family, **own, "time_over_ties": times})
    content["rows"] = others
    content["quality"] = {**content.get("quality", {}), family: figures}
    return record.replace("methods", content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="strong4")
    parser.add_argument("--experts", type=Path, default=Path("experts"))
    parser.add_argument("--work", type=Path, help="where merges and scores are kept")
    parser.add_argument("--prompts", type=int, default=64, help="prompts a task in the report")
    parser.add_argument("--tuning-prompts", type=int, default=8)
    parser.add_argument("--asked", type=int, default=16, help="prompts of an expert, for methods")
    parser.add_argument("--method", action="append", choices=sorted(TRIALS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = FAMILIES[args.family]
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
    asked = prompt_files(folders, args.asked, work / "asked", dict(report[0]))
    how = record.made({"report": REPORT_SEED, "tune": TUNE_SEED, "prompts": CALIBRATION_SEED})
    how |= {"prompts_per_task": args.prompts, "tuning_prompts_per_task": args.tuning_prompts}
    how |= {"prompts_of_methods": args.asked, "experts": len(names)}
    rows: list[dict[str, Any]] = []
    for method in args.method or TRIALS:
        rows.append(row(method, made, asked, scorer, report, tuning))
        print(rows[-1], flush=True)
        path = write(args.family, rows, how)
    print(path)


if __name__ == "__main__":
    main()
