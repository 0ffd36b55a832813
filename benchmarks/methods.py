"""What each data-free merge method costs beside `ties` on the same inputs, as whole processes in turn.

    python benchmarks/methods.py [--base DIR] [--work DIR] [--method NAME]...

Four experts of SmolLM2-135M-Instruct whose changes are random: a few directions and noise. Their answers are worth
nothing, so that no quality is measured here: that is `method_quality.py`. Time is that of the processor, which other programs on the machine
hardly change; each ratio is to the run of `ties` just before.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import mergekit.merge_methods  # noqa: F401 (before the package, so that the start-up hook completes it)
import record
import torch
import yaml
from base_models import make_base
from safetensors.torch import load_file, save_file

from mergekit_mediator.methods.data_free import DATA_FREE

EXPERTS, SEED, SIZE, RANK = 4, 0, 1e-3, 8


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


def cost(method: str, base: Path, experts: list[Path]) -> tuple[float, int]:
    """Processor seconds and peak resident bytes of one `mergekit-yaml` process."""
    config: dict[str, Any] = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(expert)} for expert in experts],
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
    parser.add_argument("--method", action="append", choices=[m.spec.name for m in DATA_FREE])
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    base = (arguments.base or work / "base").resolve()
    if not base.exists():
        make_base("smollm2", base)
    experts = [work / f"expert-{index}" for index in range(EXPERTS)]
    for index, expert in enumerate(experts):
        if not expert.exists():
            make_expert(base, expert, SEED + index)
    rows = []
    for method in arguments.method or [m.spec.name for m in DATA_FREE]:
        of_ties, of_method = cost("ties", base, experts), cost(method, base, experts)
        rows.append(
            {
                "family": "random",
                "method": method,
                "time_over_ties": round(of_method[0] / of_ties[0], 3),
                "peak_memory_over_ties": round(of_method[1] / of_ties[1], 3),
                "processor_seconds": round(of_method[0], 1),
                "peak_bytes": of_method[1],
            }
        )
        print(rows[-1], flush=True)
    known = record.read("methods") if record.exists("methods") else {"rows": []}
    measured = [row["method"] for row in rows]
    # rows of other methods stay, and those of method_quality.py
    others = [r for r in known["rows"] if r["family"] != "random" or r["method"] not in measured]
    random = [row for row in (*rows, *others) if row["family"] == "random"]
    ordered = sorted(random, key=lambda row: row["method"])
    figures = {"rows": [*ordered, *(row for row in others if row["family"] != "random")]}
    seeds = {"changes": SEED}
    if arguments.method:
        part = f"cost of {', '.join(measured)}"
        print(record.amend("methods", part, figures, seeds))
    else:
        figures |= {"experts": EXPERTS, "threads": torch.get_num_threads()}
        print(record.write("methods", {"quality": known.get("quality", {}), **figures}, seeds))


if __name__ == "__main__":
    main()
