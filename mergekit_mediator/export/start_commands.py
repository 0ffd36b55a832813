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


def llama_cpp_commands(model: str, folder: Path, exported: Sequence[ExportedExpert]) -> str:
    """How llama.cpp converts base and adapters, and is started with all of them switched off.

    A request then says what each adapter weighs, as `"lora": [{"id": 0, "scale": 0.6}, ...]`, with explicit
    zeros for the others.

    Args:
        model: what the adapters are added to.
        folder: of the adapters.
        exported: the adapters.
    """
    base = str(folder / "base.gguf")
    files = [str(folder / f"{expert.name}.gguf") for expert in exported]
    lines = [["python", "convert_hf_to_gguf.py", model, "--outfile", base]]
    for expert, file in zip(exported, files, strict=True):
        source = str(folder / expert.name)
        convert = ["python", "convert_lora_to_gguf.py", source, "--base", model]
        lines.append([*convert, "--outfile", file])
    server = ["llama-server", "-m", base, "--lora", ",".join(files), "--lora-init-without-apply"]
    return "\n".join(shlex.join(words) for words in [*lines, server])
