"""The commands that start engines on an artifact with exported adapters."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from mergekit_mediator.errors import ExportError
from mergekit_mediator.export.figures import ExportedExpert

# The ranks that vLLM allows as --max-lora-rank (vllm/config/lora.py, 0.32).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def vllm_command(model: str, folder: Path, exported: Sequence[ExportedExpert]) -> str:
    """Make the command that starts vLLM with the adapters by name; without the plugin it does not route.

    Args:
        model: the model that the adapters are added to.
        folder: the folder of the adapters.
        exported: the figures of the adapters.

    Raises:
        ExportError: a rank is above every rank that vLLM allows.
    """
    rank = vllm_rank(max(expert.rank for expert in exported))
    modules = [f"{expert.name}={folder / expert.name}" for expert in exported]
    words = ["vllm", "serve", model, "--enable-lora", "--max-loras", str(len(exported) + 1)]
    return shlex.join([*words, "--max-lora-rank", str(rank), "--lora-modules", *modules])


def vllm_rank(rank: int) -> int:
    """Return the smallest rank that vLLM allows and that is at least this rank.

    Raises:
        ExportError: the rank is above every rank that vLLM allows.
    """
    largest = VLLM_RANKS[-1]
    if rank > largest:
        raise ExportError(f"rank {rank}: vLLM takes at most {largest}: export a smaller rank")
    return next(allowed for allowed in VLLM_RANKS if allowed >= rank)


def sglang_command(model: str, folder: Path, exported: Sequence[ExportedExpert]) -> str:
    """Make the command that starts SGLang with the adapters by name; requests name `MODEL:EXPERT`.

    Args:
        model: the model that the adapters are added to.
        folder: the folder of the adapters.
        exported: the figures of the adapters.
    """
    targets = sorted({module for expert in exported for module in expert.modules})
    rank = max(expert.rank for expert in exported)
    paths = [f"{expert.name}={folder / expert.name}" for expert in exported]
    words = ["python", "-m", "sglang.launch_server", "--model-path", model, "--enable-lora"]
    words += ["--max-lora-rank", str(rank), "--max-loras-per-batch", str(len(exported) + 1)]
    return shlex.join([*words, "--lora-target-modules", *targets, "--lora-paths", *paths])


def llama_cpp_commands(model: str, folder: Path, exported: Sequence[ExportedExpert]) -> str:
    """Make the command that starts llama.cpp with all adapters off, after those that convert what is no GGUF yet.

    A request then gives the weight of each adapter, as `"lora": [{"id": 0, "scale": 0.6}, ...]`, with explicit
    zeros for the others. The server's cache of earlier prompts is off: it returns keys and values that were
    computed with other adapters.

    Args:
        model: the model that the adapters are added to, a GGUF file or one that is to be converted.
        folder: the folder of the adapters, GGUF files or PEFT's folders.
        exported: the figures of the adapters.
    """
    lines, base = [], model
    if not model.endswith(".gguf"):
        base = str(folder / "base.gguf")
        lines.append(["python", "convert_hf_to_gguf.py", model, "--outfile", base])
    files = [str(folder / f"{expert.name}.gguf") for expert in exported]
    for expert, file in zip(exported, files, strict=True):
        if (source := folder / expert.name).is_dir():
            convert = ["python", "convert_lora_to_gguf.py", str(source), "--base", model]
            lines.append([*convert, "--outfile", file])
    server = ["llama-server", "-m", base, "--lora", ",".join(files), "--lora-init-without-apply"]
    server += ["--cache-ram", "0"]
    return "\n".join(shlex.join(words) for words in [*lines, server])
