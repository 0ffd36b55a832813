"""Does it work on a GPU, and how fast is it there?

    python benchmarks/gpu.py --minutes 6 --work gpu

Models in the shape of Llama 3.1 8B with fewer layers and a smaller vocabulary are made by seed. Each part runs in
a process of its own that may take the rest of the time, in order of worth; results are written as they come, to
results/gpu.json. What the steps of a merge and of a mixture take stands beside what the card can do.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# a process that has asked the driver cannot be forked any more: torch then asks another library
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
import gpu_family
import gpu_limits
import gpu_merging
import gpu_serving
import record
import torch

PICO = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2, "vocab_size": 1024}
PICO |= {"num_key_value_heads": 1}
FOLDERS = {label: "merged-" + label.replace(": ", "-") for label in gpu_merging.MERGES}
SEEDS = {"weights": gpu_family.SEED}
Part = Callable[[], Any]


class Run:
    """Parts, each in a process of its own, whose results are written as they come."""

    def __init__(self, name: str, minutes: float, figures: dict[str, Any]) -> None:
        self._name, self._ends = name, time.monotonic() + 60 * minutes
        self.figures, self.forks = figures, True

    def __call__(self, label: str, part: Part) -> None:
        """Run a part unless the time is up; `label` may name a place in a dictionary, as `a/b`."""
        left = self._ends - time.monotonic()
        started = time.monotonic()
        result: Any = "not run: the time was up"
        if left > 5:
            result = _in_a_process(part, left) if self.forks else _here(part)
        place = self.figures
        *parents, last = label.split("/")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = result
        record.write(self._name, self.figures | summary(self.figures), SEEDS)
        print(f"{label} ({time.monotonic() - started:.1f} s): {result}", flush=True)


def _in_a_process(part: Part, seconds: float) -> Any:
    """The result of a part, or why there is none. A fork has imported everything, but started no device."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def work() -> None:
        try:
            theirs.send(part())
        except BaseException:
            theirs.send(f"failed: {traceback.format_exc()[-1500:]}")
            raise

    process = context.Process(target=work)
    process.start()
    theirs.close()
    try:
        result = ours.recv() if ours.poll(seconds) else "stopped: the time was up"
    except EOFError:
        result = "failed: the process ended"
    process.kill()
    process.join()
    return result


def _here(part: Part) -> Any:
    """The result of a part in this process."""
    try:
        return part()
    except Exception:  # noqa: BLE001 (the other parts run)
        return f"failed: {traceback.format_exc()[-1500:]}"


def card(device: str) -> dict[str, str]:
    """The device, its driver and the libraries' versions of it."""
    if device == "cpu":
        return {"card": "none"}
    properties = torch.cuda.get_device_properties(0)
    version: Any = torch.version
    return {
        "card": properties.name,
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "driver": Path("/proc/driver/nvidia/version").read_text().split("\n")[0]
        if Path("/proc/driver/nvidia/version").exists()
        else "unknown",
        "cuda": str(version.cuda),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Does it work on a GPU, and how fast?")
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--work", type=Path, default=Path("gpu"), help="where models are kept")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--profile", action="store_true", help="of the operations of a mixture")
    parser.add_argument("--pico", action="store_true", help="small models, to try this script")
    parser.add_argument("--parts", default="", help="that begin like these, separated by commas")
    parser.add_argument("--name", default="gpu", help="of the file of results")
    args = parser.parse_args()
    device, changes = args.device, PICO if args.pico else {}
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "no CUDA device: run this on a machine with a GPU, or give --device cpu --pico"
        )
    only = tuple(args.parts.split(","))
    run = Run(args.name, args.minutes, {"layers": args.layers, "experts": len(gpu_family.EXPERTS)})

    def part(label: str, function: Part) -> None:
        if label.startswith(only):
            run(label, function)

    base, experts = (
        args.work / "models/base",
        {n: args.work / "models" / n for n in gpu_family.EXPERTS},
    )
    run("machine_card", lambda: card(device))
    if not isinstance(run.figures["machine_card"], dict):
        run.forks = False  # something has started the device before
        run("machine_card", lambda: card(device))
    run(
        "models",
        lambda: {
            "seconds": _taken(
                lambda: gpu_family.make(args.work / "models", args.layers, device, **changes)
            ),
            "parameters": gpu_family.parameters(base),
        },
    )
    small = {"size": 1 << 20} if args.pico else {}
    run("ceilings", lambda: gpu_limits.ceilings(device, **small))
    shape = {"out": 512, "width": 256} if args.pico else {}
    part("steps", lambda: gpu_limits.steps(device, **shape))
    ceilings = run.figures.get("ceilings")
    bandwidth = 1e9 * (ceilings["copy_gb_per_second"] if isinstance(ceilings, dict) else 1)
    places = {name: str(path) for name, path in experts.items()}

    def merge(label: str) -> None:
        part(
            f"merging/{label}",
            lambda: gpu_merging.merge(label, base, places, args.work / FOLDERS[label], device),
        )

    def serve(form: str, label: str) -> None:
        part(f"serving/{form}", lambda: _served(args.work / FOLDERS[label], args, bandwidth))

    merge("budget: 1.1x")
    merge("route: auto")
    merge("linear")
    serve("low rank plus sparse", "budget: 1.1x")
    merge("density: 0.1")
    serve("sparse", "density: 0.1")

    def adapted() -> dict[str, Any]:
        adapters = gpu_family.make_adapters(args.work / "adapters", base, args.layers, **changes)
        places = {name: f"{base}+{path}" for name, path in adapters.items()}
        return gpu_merging.merge("adapters", base, places, args.work / FOLDERS["adapters"], device)

    part("merging/adapters", adapted)
    serve("adapters", "adapters")
    adapters = {name: args.work / "adapters" / f"{name}-adapter" for name in gpu_family.EXPERTS}
    part(
        "serving/PEFT's mixed batch",
        lambda: gpu_serving.peft_batch(base, adapters, device, args.rounds // 2, args.tokens),
    )
    part(
        "serving/host memory",
        lambda: gpu_serving.offloading(
            args.work / FOLDERS["budget: 1.1x"], device, 2, 8 if args.pico else 256
        ),
    )
    merge("ties")
    few = args.work / "few"
    part("few/models", lambda: _taken(lambda: gpu_family.make(few, 1, device, **changes)))
    few_places = {name: str(few / name) for name in gpu_family.EXPERTS}
    for label in ("linear", "route: auto", "budget: 1.1x", "ties"):
        for where in dict.fromkeys((device, "cpu")):
            part(
                f"few/{where}/{label}",
                lambda label=label, where=where: gpu_merging.merge(  # type: ignore[misc]
                    label, few / "base", few_places, args.work / "few-out", where
                ),
            )


def summary(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures that other files name, and what merges of all layers of an 8B model would take."""
    found: dict[str, Any] = {}
    if isinstance(figures.get("machine_card"), dict):
        found["card"] = figures["machine_card"]["card"]
    served = figures.get("serving", {}).get("low rank plus sparse")
    if isinstance(served, dict):
        for key, part in (
            ("enter_over_bandwidth", "entering"),
            ("decode_over_dense", "decoding"),
            ("mixed_batch_speedup", "batches"),
        ):
            found[key] = served[part][key]
    minutes = {
        label: round(gpu_merging.at_full_size(figures["models"]["parameters"], merge["seconds"]), 2)
        for label, merge in figures.get("merging", {}).items()
        if isinstance(merge, dict) and isinstance(figures.get("models"), dict)
    }
    if minutes:
        found["minutes_of_8b"] = minutes
        found["budget_8b_minutes"] = minutes.get("budget: 1.1x")
    return found


def _served(root: Path, args: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    """The figures of serving one artifact."""
    with torch.no_grad():
        model = gpu_serving.load(root, args.device)
        return {
            "entering": gpu_serving.entering(model, bandwidth, 3 * args.rounds, args.profile),
            "decoding": gpu_serving.decoding(model, root, args.device, args.rounds, args.tokens),
            "batches": gpu_serving.batches(model, args.device, args.rounds // 2, args.tokens),
        }


def _taken(function: Part) -> float:
    started = time.monotonic()
    function()
    return round(time.monotonic() - started, 1)


if __name__ == "__main__":
    main()
