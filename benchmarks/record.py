"""Write what a benchmark found, with all that it takes to find it again."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("mergekit-mediator", "mergekit", "torch", "transformers", "reasoning-gym", "numpy")


def processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


def card() -> dict[str, str]:
    """The GPU's name if this process uses one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    return {"card": torch.cuda.get_device_name()}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def write(name: str, figures: dict[str, Any], seeds: dict[str, int] | None = None) -> Path:
    """Write results/NAME.json: how the figures were made, and the figures."""
    return replace(name, {**made(seeds), **figures})


def amend(
    name: str, part: str, figures: dict[str, Any], seeds: dict[str, int] | None = None
) -> Path:
    """Replace figures in results/NAME.json, and note under `also` how this part of them was made."""
    there = read(name)
    also = {**there.get("also", {}), part: made(seeds)}
    return replace(name, {**there, **figures, "also": also})


def made(seeds: dict[str, int] | None = None) -> dict[str, Any]:
    """How results are made: the command (paths by their last part), versions, machine and seeds."""
    return {
        "command": shlex.join(["python", *(arg.rsplit("/", 1)[-1] for arg in sys.argv)]),
        "versions": {package: version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "machine": {
            **{"processor": processor(), "cores": os.cpu_count(), "system": platform.system()},
            **card(),
        },
        "seeds": seeds or {},
    }


def replace(name: str, content: dict[str, Any]) -> Path:
    """Write results/NAME.json as it is to be."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def exists(name: str) -> bool:
    """Whether results/NAME.json has been written."""
    return (RESULTS / f"{name}.json").exists()


def read(name: str) -> dict[str, Any]:
    """What `write` wrote."""
    record: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return record
