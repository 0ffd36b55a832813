"""What a merge costs beside mergekit's own methods on the same inputs, as whole processes in turn.

    python benchmarks/merge_cost.py BASE EXPERT EXPERT... [--runs 3] [--density 0.1]

Ratios are medians over runs of figures that were measured one after the other, so that they hold
on a machine whose speed drifts.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import record
import yaml


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


def run(text: str, folder: Path) -> tuple[float, int]:
    """Seconds and peak resident bytes of one `mergekit-yaml` process."""
    (folder / "config.yml").write_text(text)
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [str(Path(sys.executable).with_name("mergekit-yaml")), "config.yml", "out", "--quiet"]
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return time.perf_counter() - began, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("experts", nargs="+")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--density", type=float, default=0.1)
    arguments = parser.parse_args()
    base, experts = str(Path(arguments.base).resolve()), arguments.experts
    experts = [str(Path(e).resolve()) for e in experts]
    density = arguments.density
    configs = {
        "linear": config("linear", base, experts, {}),
        "ties": config("ties", base, experts, {"density": density}),
        "mediator": config("mediator", base, experts, {"density": density}),
        "mediator, all routed": config(
            "mediator", base, experts, {"density": density, "route": "all"}
        ),
    }
    runs: dict[str, list[tuple[float, int]]] = {name: [] for name in configs}
    with tempfile.TemporaryDirectory() as scratch:
        run(configs["linear"], Path(scratch))  # the files are in the page cache from here on
        for _ in range(arguments.runs):
            for name, text in configs.items():
                runs[name].append(run(text, Path(scratch)))

    def ratio(name: str, other: str, figure: int) -> float:
        pairs = zip(runs[name], runs[other], strict=True)
        return round(median(a[figure] / b[figure] for a, b in pairs), 3)

    figures = {
        "experts": len(experts),
        "density": density,
        "runs": arguments.runs,
        "wall_over_linear": ratio("mediator", "linear", 0),
        "wall_over_ties": ratio("mediator", "ties", 0),
        "peak_memory_over_linear": ratio("mediator", "linear", 1),
        "all_routed": {
            "wall_over_linear": ratio("mediator, all routed", "linear", 0),
            "wall_over_ties": ratio("mediator, all routed", "ties", 0),
            "peak_memory_over_linear": ratio("mediator, all routed", "linear", 1),
        },
        "median_seconds": {n: round(median(r[0] for r in rs), 2) for n, rs in runs.items()},
        "median_peak_bytes": {n: int(median(r[1] for r in rs)) for n, rs in runs.items()},
    }
    print(record.write("merge-cost", figures))


if __name__ == "__main__":
    main()
