"""What grows with the number of experts, and how much?

    python benchmarks/scale.py --part memory --base BASE
    python benchmarks/scale.py --part quality

`memory`: peak memory and time of whole merge processes over 4, 8, 16 and 32 full fine-tunes of a model
that has BASE's vocabulary and width and two blocks: the largest weight decides, and it is BASE's. The
fine-tunes are random; what is stored of them is not looked at. Anonymous memory is what a process
cannot do without; pages of mapped files, which the system takes back when it needs them, come on top.

`quality`: 4, 8, 16 and 32 full fine-tunes of a model of half a million parameters, each of which has learned
a cipher of its own: bytes, time, accuracy and routing as N grows. The base knows no cipher; a prompt
names its cipher. Both parts go to results/scale.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ciphers
import record
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

COUNTS = (4, 8, 16, 32)
MERGES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear"},
    "route: auto": {"merge_method": "mediator", "parameters": {"density": 0.1}},
    "route: all": {"merge_method": "mediator", "parameters": {"route": "all", "density": 0.1}},
    "budget": {"merge_method": "mediator", "parameters": {"budget": "1.5x"}},
}


def wide_family(base: Path, work: Path, count: int) -> tuple[Path, list[Path]]:
    """A model of two blocks with the base's vocabulary, and random fine-tunes of it."""
    config = AutoConfig.from_pretrained(base)
    config.num_hidden_layers = 2
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(base)
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    folders = [work / "wide", *(work / f"wide-{i}" for i in range(count))]
    for seed, folder in enumerate(folders):
        if not (folder / "config.json").exists():
            torch.manual_seed(seed)
            for name, weight in model.state_dict().items():
                change = 1e-3 * torch.randn_like(weight) if seed else 0.0
                weight.copy_(start[name] + change)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return folders[0], folders[1:]


def configured(merge: dict[str, Any], base: Path, experts: list[Path]) -> dict[str, Any]:
    """A merge configuration of these models."""
    weight = {} if merge["merge_method"] == "mediator" else {"weight": 1.0}
    models = [{"model": str(e.resolve()), "parameters": weight} for e in experts]
    config = {"models": models, "dtype": "float32", "out_dtype": "bfloat16", **merge}
    if merge["merge_method"] != "linear":
        config["base_model"] = str(base.resolve())
    return config


def measured(config: dict[str, Any]) -> dict[str, float]:
    """Seconds and peak memory in bytes of one `mergekit-yaml` process."""
    command = str(Path(sys.executable).with_name("mergekit-yaml"))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.yml").write_text(yaml.safe_dump(config))
        began, peak = time.perf_counter(), {"RssAnon": 0, "RssFile": 0, "VmHWM": 0}
        process = subprocess.Popen([command, "config.yml", "out", "--quiet"], cwd=folder)
        while process.poll() is None:
            for name, size in _memory(process.pid).items():
                peak[name] = max(peak[name], size)
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        if process.returncode:
            raise SystemExit(f"failed: {config['merge_method']}")
    return {
        "seconds": round(seconds, 1),
        "peak_anonymous_bytes": peak["RssAnon"],
        "peak_resident_bytes": peak["VmHWM"],
    }


def _memory(process: int) -> dict[str, int]:
    """Figures of a process in bytes, as the system tells them."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    found = (line.split() for line in lines)
    return {
        words[0][:-1]: 1024 * int(words[1])
        for words in found
        if words and words[0] in ("RssAnon:", "RssFile:", "VmHWM:")
    }


def memory(
    base: Path, work: Path, counts: tuple[int, ...], merges: list[str]
) -> Iterator[dict[str, Any]]:
    """By merge and number of experts: seconds and peak memory, again after each that is measured."""
    start, experts = wide_family(base, work, max(counts))
    narrow: Any = AutoModelForCausalLM.from_pretrained(start, dtype=torch.bfloat16)
    largest = max(weight.numel() * weight.element_size() for weight in narrow.parameters())
    known = record.read("scale") if record.exists("scale") else {}
    rows: dict[str, Any] = dict(known.get("memory", {}).get("merges", {}))
    for name in merges:
        rows[name] = dict(rows.get(name, {}))
        for count in counts:
            rows[name][str(count)] = measured(configured(MERGES[name], start, experts[:count]))
            print(name, count, rows[name][str(count)], flush=True)
            yield {"largest_weight_bytes": largest, "merges": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description="What grows with the number of experts?")
    parser.add_argument("--part", choices=("memory", "quality"), required=True)
    parser.add_argument("--base", type=Path, help="checkpoint directory, for its vocabulary")
    parser.add_argument("--work", type=Path, default=Path("scale"), help="where models are kept")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--merges", nargs="+", choices=list(MERGES), default=list(MERGES))
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    counts = tuple(args.counts)
    parts = (
        memory(args.base, args.work, counts, args.merges)
        if args.part == "memory"
        else ciphers.quality(args.work, counts)
    )
    known = record.read("scale") if record.exists("scale") else {}
    known = {name: known[name] for name in ("memory", "quality") if name in known}
    for found in parts:
        path = record.write("scale", {**known, args.part: found}, {"ciphers": ciphers.SEED})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
