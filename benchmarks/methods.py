"""What each merge method costs beside `ties` on the same inputs, as whole processes in turn.

    python benchmarks/methods.py [--base DIR] [--work DIR] [--method NAME]...
    python benchmarks/methods.py --experts experts --family strong4

Four experts of SmolLM2-135M-Instruct whose changes are random: a few directions and noise. Their answers are worth
nothing, so that no quality is measured here: that is `method_quality.py`. Methods with prompts are measured on experts
that can answer, with --experts. Time is that of the processor, which other programs on the machine hardly change;
each ratio is to the run of `ties` just before.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mergekit.merge_methods  # noqa: F401 (before the package, so that the start-up hook completes it)
import record
import torch
import yaml
from artifacts import CALIBRATION_SEED, prompt_files, tasks_of
from base_models import make_base
from safetensors.torch import load_file, save_file
from train_experts import FAMILIES, REPORT_SEED

from mergekit_mediator.methods import data_free, with_prompts

EXPERTS, SEED, SIZE, RANK = 4, 0, 1e-3, 8
DATA_FREE = [method.spec.name for method in data_free.DATA_FREE]
WITH_PROMPTS = [method.spec.name for method in with_prompts.WITH_PROMPTS]


def make_expert(base: Path, out: Path, seed: int) -> None:
    """A copy of a checkpoint whose weights changed at random."""
    shutil.copytree(base, out)
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(out / "model.safetensors")
    for name, weight in weights.items():
        change = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 2:
            left = torch.randn(weight.shape[0], RANK, generator=generator)
            change += left @ torch.randn(RANK, weight.shape[1], generator=generator)
        weights[name] = (weight.float() + SIZE * change).to(weight.dtype)
    save_file(weights, out / "model.safetensors", {"format": "pt"})


def cost(
    method: str, base: Path, experts: Sequence[Path], prompts: Mapping[str, Path]
) -> tuple[float, int]:
    """Processor seconds and peak resident bytes of one `mergekit-yaml` process.

    Prompts are those of an expert, by the name of its folder. With `rcp` the first expert stays whole.
    """
    models: list[dict[str, Any]] = [{"model": str(expert)} for expert in experts]
    for entry, expert in zip(models, experts, strict=True) if method in WITH_PROMPTS else ():
        entry["parameters"] = {"prompts": str(prompts[expert.name])}
        if method == "rcp":
            entry["parameters"]["reasoning"] = expert == experts[0]
    config: dict[str, Any] = {
        "merge_method": method,
        "base_model": str(base),
        "models": models,
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    if method == "ties":
        config["parameters"] = {"weight": 1.0, "density": 0.2}
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.yml").write_text(yaml.safe_dump(config))
        script = str(Path(sys.executable).with_name("mergekit-yaml"))
        command = [script, "config.yml", "out", "--quiet"]
        process = subprocess.Popen(command, cwd=scratch, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {method}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--work", type=Path, default=Path("bench/methods"))
    parser.add_argument("--method", action="append", choices=[*DATA_FREE, *WITH_PROMPTS])
    parser.add_argument("--experts", type=Path, help="train_experts' --out, for prompts")
    parser.add_argument(
        "--family", choices=sorted(FAMILIES), default="strong4", help="of --experts"
    )
    parser.add_argument("--asked", type=int, default=16, help="prompts of an expert")
    arguments = parser.parse_args()
    methods = arguments.method or (WITH_PROMPTS if arguments.experts else DATA_FREE)
    if set(methods) & set(WITH_PROMPTS) and not arguments.experts:
        parser.error("methods with prompts need experts that answer: give --experts")
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    prompts: dict[str, Path] = {}
    if arguments.experts:
        family, base = f"{arguments.family}, asked", (arguments.experts / "base").resolve()
        folders = {n: (arguments.experts / n).resolve() for n in FAMILIES[arguments.family]}
        reported = tasks_of(folders, 1, REPORT_SEED)
        prompts = prompt_files(folders, arguments.asked, work / "asked", reported)
        experts = list(folders.values())
    else:
        family, base = "random", (arguments.base or work / "base").resolve()
        if not base.exists():
            make_base("smollm2", base)
        experts = [work / f"expert-{index}" for index in range(EXPERTS)]
        for index, expert in enumerate(experts):
            if not expert.exists():
                make_expert(base, expert, SEED + index)
    rows = []
    for method in methods:
        of_ties, of_method = (cost(m, base, experts, prompts) for m in ("ties", method))
        rows.append(
            {
                "family": family,
                "method": method,
                "time_over_ties": round(of_method[0] / of_ties[0], 3),
                "peak_memory_over_ties": round(of_method[1] / of_ties[1], 3),
                "processor_seconds": round(of_method[0], 1),
                "peak_bytes": of_method[1],
                **({"asked": arguments.asked} if prompts else {}),
            }
        )
        print(rows[-1], flush=True)
    known = record.read("methods") if record.exists("methods") else {"rows": []}
    measured = [row["method"] for row in rows]
    # rows of other methods stay, and those of method_quality.py
    others = [r for r in known["rows"] if r["family"] != family or r["method"] not in measured]
    own = [row for row in (*rows, *others) if row["family"] == family]
    ordered = sorted(own, key=lambda row: row["method"])
    figures: dict[str, Any] = {
        "rows": [*ordered, *(row for row in others if row["family"] != family)]
    }
    seeds = {"prompts": CALIBRATION_SEED} if arguments.experts else {"changes": SEED}
    if arguments.method or arguments.experts:
        part = f"cost of {', '.join(measured)}"
        print(record.amend("methods", part, figures, seeds))
    else:
        figures |= {"experts": EXPERTS, "threads": torch.get_num_threads()}
        print(record.write("methods", {"quality": known.get("quality", {}), **figures}, seeds))


if __name__ == "__main__":
    main()
