"""How small is an exact expert, how fast is it coded, and how do general tools compare?

    python benchmarks/lossless.py --experts experts --tasks A,B,C

The last expert of the list against the average of all. Other tools get the whole of both as one stream
and are left out if they are not installed (`pip install zipnn z4ai`). Times are of one core.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
import zstandard
from safetensors.torch import load_file

from mergekit_mediator.delta.sparse import encode
from mergekit_mediator.store.codec import decode_bytes, encode_bytes


def ours(expert: dict[str, Any], dense: dict[str, Any], density: float) -> dict[str, Any]:
    stored = positions = kept = 0
    selecting = coding = decoding = 0.0
    numel = sum(weight.numel() for weight in expert.values())
    for name, weight in expert.items():
        start = time.process_time()
        sparse = encode(weight, dense[name], density)
        selected = time.process_time()
        stream, description = encode_bytes(sparse, dense[name])
        coded = time.process_time()
        again = decode_bytes(stream, description, name, dense[name])
        decoding += time.process_time() - coded
        coding, selecting = coding + coded - selected, selecting + selected - start
        if not torch.equal(again.codes.view(torch.int16), sparse.codes.view(torch.int16)):
            raise SystemExit(f"{name}: not the same bits")
        stored, kept = stored + stream.numel(), kept + description.count
        positions += sum(description.sizes[: len(description.heads)])
    p = kept / numel
    entropy = -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) / p
    return {
        "codec": f"exact {density:g}",
        "bits_per_parameter": 8 * stored / numel,
        "kept": p,
        "positions_over_entropy": 8 * positions / kept / entropy if p < 0.3 else None,
        "encode_million_per_second": numel / (selecting + coding) / 1e6,
        "decode_million_per_second": numel / decoding / 1e6,
    }


def general(expert: np.ndarray, dense: np.ndarray) -> dict[str, Callable[[], int]]:
    """What tools make of the 16-bit patterns of both: stored bytes."""
    xor = expert ^ dense
    planes = [(xor & 255).astype(np.uint8), (xor >> 8).astype(np.uint8)]
    tools: dict[str, Callable[[], int]] = {
        "zstd 9, XOR": lambda: len(zstandard.compress(xor.tobytes(), 9)),
        "zstd 9, byte planes of XOR": lambda: sum(
            len(zstandard.compress(plane.tobytes(), 9)) for plane in planes
        ),
    }
    if importlib.util.find_spec("zipnn"):
        from zipnn import ZipNN

        tools["zipnn, XOR"] = lambda: len(
            ZipNN(bytearray_dtype="bfloat16").compress(bytearray(xor.tobytes()))
        )
    if importlib.util.find_spec("z4ai"):
        from z4ai import compress_delta

        tools["z4ai compress_delta"] = lambda: len(
            compress_delta(expert.tobytes(), dense.tobytes(), dtype="bfloat16", threads=1)
        )
    return tools


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=Path, required=True)
    parser.add_argument("--tasks", required=True, help="folders of experts, separated by commas")
    args = parser.parse_args()
    torch.set_num_threads(1)
    experts = [load_file(args.experts / t / "model.safetensors") for t in args.tasks.split(",")]
    expert = experts[-1]
    dense = {
        name: torch.stack([e[name].float() for e in experts]).mean(dim=0).to(weight.dtype)
        for name, weight in expert.items()
    }
    rows = [ours(expert, dense, density) for density in (0.01, 0.05, 0.1, 1.0)]
    print(*rows, sep="\n", flush=True)
    numel = sum(weight.numel() for weight in expert.values())
    patterns = [
        np.concatenate([w.view(torch.int16).numpy().view(np.uint16).ravel() for w in s.values()])
        for s in (expert, dense)
    ]
    for name, tool in general(*patterns).items():
        start = time.process_time()
        bits = 8 * tool() / numel
        speed = numel / (time.process_time() - start) / 1e6
        rows.append({"codec": name, "bits_per_parameter": bits, "encode_million_per_second": speed})
        print(rows[-1], flush=True)
    versions = {tool: record.version(tool) for tool in ("zstandard", "zipnn", "z4ai")}
    record.write("lossless", {"rows": rows, "tools": versions})


if __name__ == "__main__":
    main()
