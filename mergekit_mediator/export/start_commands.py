"""The commands that start engines on an artifact with exported adapters."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from mergekit_mediator.errors import ExportError
from mergekit_mediator.export.folder import ExportedExpert

# The ranks that vLLM takes as --max-lora-rank (vllm/config/lora.py, 0.32).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def vllm_command(model: str, folder: Path, exported: Sequence[ExportedExpert]) -> str:
    """How vLLM is started with the adapters by name; without the plugin it does not route.

    Args:
        model: what the adapters are added to.
        folder: of the adapters.
        exported: the adapters.

    Raises:
        ExportError: a rank that vLLM does not take.
    """
    rank = vllm_rank(max(expert.rank for expert in exported))
    modules = [f"{expert.name}={folder / expert.name}" for expert in exported]
    words = ["vllm", "serve", model, "--enable-lora", "--max-loras", str(len(exported) + 1)]
    return shlex.join([*words, "--max-lora-rank", str(rank), "--lora-modules", *modules])


def vllm_rank(rank: int) -> int:
    """The smallest rank that vLLM takes and that is enough.

    Raises:
        ExportError: a rank above all that vLLM takes.
    """
    enough = next((r for r in VLLM_RANKS if r >= rank), None)
    if enough is None:
        raise ExportError(f"rank {rank}: vLLM takes at most {VLLM_RANKS[-1]}: export a smaller one")
    return enough


def sglang_command(model: str, folder: Path, exported: Sequence[ExportedExpert]) -> str:
    """How SGLang is started with the adapters by name; requests name `MODEL:EXPERT`.

    Args:
        model: what the adapters are added to.
        folder: of the adapters.
        exported: the adapters.
    """
    targets = sorted({module for expert in exported for module in expert.modules})
    rank = max(expert.rank for expert in exported)
    paths = [f"{expert.name}={folder / expert.name}" for expert in exported]
    words = ["python", "-m", "sglang.launch_server", "--model-path", model, "--enable-lora"]
    words += ["--max-lora-rank", str(rank), "--max-loras-per-batch", str(len(exported) + 1)]
    return shlex.join([*words, "--lora-target-modules", *targets, "--lora-paths", *paths])
