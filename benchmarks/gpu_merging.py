"""Merges of four experts in the shape of an 8B model: time, and peak memory of the host and of the device."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import mergekit.merge
import torch
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_mediator.merge import plugin

FULL_PARAMETERS = 8_030_261_248  # of Llama 3.1 8B
MERGES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear"},
    "ties": {"merge_method": "ties"},
    "route: auto": {"merge_method": "mediator", "parameters": {"route": "auto", "density": 0.1}},
    "budget: 1.1x": {
        "merge_method": "mediator",
        "parameters": {"budget": "1.1x", "reference": "base"},
    },
    "density: 0.1": {"merge_method": "mediator", "parameters": {"route": "all", "density": 0.1}},
    "adapters": {"merge_method": "mediator"},
}


def configuration(label: str, base: Path, experts: dict[str, str]) -> MergeConfiguration:
    """A configuration of a merge of all experts."""
    merge = MERGES[label]
    own = {"linear": {"weight": 1.0}, "ties": {"weight": 1.0, "density": 0.1}}
    models = [
        {"model": place, "parameters": own.get(label, {"expert": name})}
        for name, place in experts.items()
    ]
    if label == "linear":  # so that it reads the same inputs as the others
        models.insert(0, {"model": str(base), "parameters": {"weight": 0.0}})
    document = {"models": models, "dtype": "float32", "out_dtype": "bfloat16", **merge}
    if label != "linear":
        document["base_model"] = str(base)
    return MergeConfiguration.model_validate(document)


def host_bytes() -> dict[str, int]:
    """The memory of this process: its own, and of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    words = (line.split() for line in lines)
    return {w[0][:-1]: 1024 * int(w[1]) for w in words if w and w[0] in ("RssAnon:", "RssFile:")}


class Peak:
    """The largest memory of this process inside the context, beyond what it had before."""

    def __enter__(self) -> Peak:
        self._before, self.most, self._ended = host_bytes(), host_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            now = host_bytes()
            self.most = {name: max(size, self.most[name]) for name, size in now.items()}

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.beyond = {name: size - self._before[name] for name, size in self.most.items()}


def at_full_size(parameters: int, seconds: float) -> float:
    """The minutes of a merge of all parameters of the 8B model, in proportion; what any merge takes counts too often."""
    return seconds * FULL_PARAMETERS / parameters / 60


def merge(
    label: str, base: Path, experts: dict[str, str], out: Path, device: str
) -> dict[str, Any]:
    """Merge in this process; the device is `cpu` or `cuda`."""
    shutil.rmtree(out, ignore_errors=True)
    plugin.install()
    on_gpu = device == "cuda"
    if on_gpu:
        torch.zeros(1, device=device)  # starts the device
        torch.cuda.reset_peak_memory_stats()
    options = MergeOptions(device=device, quiet=True, write_model_card=False)
    started = time.perf_counter()
    with Peak() as peak:
        mergekit.merge.run_merge(configuration(label, base, experts), str(out), options)
    seconds = time.perf_counter() - started
    return {
        "seconds": round(seconds, 2),
        "host_peak_bytes": peak.beyond["RssAnon"],
        "mapped_peak_bytes": peak.beyond["RssFile"],
        "device_peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "out_bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
    }
