"""What a merge costs beside mergekit's own methods on the same inputs, as whole processes in turn.

    python benchmarks/merge_cost.py BASE EXPERT EXPERT... [--runs 3] [--density 0.1]

Processor time and peak memory of `mergekit-yaml`, and of `mergekit-extract-lora` for all experts one after the
other. Ratios are medians over runs of figures that were measured one after the other, so that they hold on a
machine whose speed drifts.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import record
import yaml

RANK = 16  # of the extracted adapters
BUDGET = "1.0595x"


@dataclass(frozen=True)
class Cost:
    """Seconds of the processor, and peak resident bytes, of one or several processes."""

    seconds: float
    peak: int


def config(method: str, base: str, experts: list[str], parameters: dict[str, Any]) -> str:
    """A merge configuration of one method over all experts."""
    own = {"weight": 1.0} if method != "mediator" else {}
    if method == "ties":
        own["density"] = parameters.pop("density")
    models = [{"model": e, "parameters": own} for e in experts]
    if method == "linear":  # so that it reads the same inputs as the others
        models.insert(0, {"model": base, "parameters": {"weight": 0.0}})
    document = {
        "merge_method": method,
        "models": models,
        "parameters": parameters,
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    if method != "linear":
        document["base_model"] = base
    return yaml.safe_dump(document)


def run(folder: Path, command: str, *arguments: str) -> Cost:
    """The cost of one process of a command that is installed beside this interpreter."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    words = [str(Path(sys.executable).with_name(command)), *arguments]
    process = subprocess.Popen(
        words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(words)}")
    return Cost(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def merge(folder: Path, text: str) -> Cost:
    """The cost of a merge."""
    (folder / "config.yml").write_text(text)
    return run(folder, "mergekit-yaml", "config.yml", "out", "--quiet")


def extract(folder: Path, base: str, experts: list[str]) -> Cost:
    """The cost of an adapter of each expert, with the embeddings, as `evaluate` extracts it."""
    costs = [
        run(
            *(folder, "mergekit-extract-lora", "--model", expert, "--base-model", base),
            *("--out-path", "out", "--max-rank", str(RANK), "--quiet"),
            *(
                "--embed-lora",
                "--exclude-regex",
                "lm_head",
            ),  # a tied head changes with the embeddings
        )
        for expert in experts
    ]
    return Cost(sum(c.seconds for c in costs), max(c.peak for c in costs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("experts", nargs="+")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--density", type=float, default=0.1)
    arguments = parser.parse_args()
    base, experts = str(Path(arguments.base).resolve()), arguments.experts
    experts = [str(Path(e).resolve()) for e in experts]
    density = {"density": arguments.density}

    def ours(**parameters: Any) -> str:
        return config("mediator", base, experts, parameters)

    merges = {
        "linear": config("linear", base, experts, {}),
        "ties": config("ties", base, experts, dict(density)),
        "route: auto": ours(**density, route="auto"),
        "route: all": ours(**density, route="all"),
        f"budget: {BUDGET}": ours(budget=BUDGET),
        "keep: 0.99": ours(keep=0.99),
    }
    extraction = f"mergekit-extract-lora of each expert, rank {RANK}"
    runs: dict[str, list[Cost]] = {name: [] for name in (*merges, extraction)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        merge(folder, merges["linear"])  # the files are in the page cache from here on
        for _ in range(arguments.runs):
            for name, text in merges.items():
                runs[name].append(merge(folder, text))
            runs[extraction].append(extract(folder, base, experts))

    def ratio(name: str, other: str) -> float:
        pairs = zip(runs[name], runs[other], strict=True)
        return round(median(a.seconds / b.seconds for a, b in pairs), 3)

    rows = {
        name: {
            "cpu_seconds": round(median(c.seconds for c in costs), 2),
            "peak_bytes": int(median(c.peak for c in costs)),
            "cpu_over_linear": ratio(name, "linear"),
            "cpu_over_extraction": ratio(name, extraction),
        }
        for name, costs in runs.items()
    }
    figures = {
        **{"experts": len(experts), "runs": arguments.runs, **density},
        **{"extraction": extraction, "rows": rows},
    }
    print(record.write("merge-cost", figures))


if __name__ == "__main__":
    main()
