"""The factors of plain LoRA adapters, which change a model by their factors alone: read, and written for PEFT."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_mediator.delta.factors import Factors
from mergekit_mediator.delta.narrow import narrowed
from mergekit_mediator.errors import InputError, OutputError

# `read_adapter` reads these settings, or they matter in training alone. An adapter is plain if all other
# settings of PEFT have their defaults: a setting that PEFT adds later may be a new kind of adapter.
_FREE = frozenset(
    (
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config"),
        *("ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode"),
        *("init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config"),
        *("lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type"),
        *("peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config"),
        *("target_modules", "task_type", "use_rslora"),
    )
)
# Other initialisations, such as PiSSA, change the base's weights when PEFT loads the adapter.
_INITIAL = (True, False, "gaussian", "eva", "orthogonal", "lora_ga")
_PREFIX = "base_model.model."


def read_adapter(
    directory: Path, base: Callable[[str], Tensor | None] | None = None
) -> dict[str, Factors] | None:
    """Read the factors of a plain LoRA adapter, by the name of the weight `[out, in]` to which they add.

    Args:
        directory: the directory of the adapter.
        base: gives a weight of the base model by name, or None for an unknown name. PEFT saves the head beside
            its factors; such an adapter is plain only if `base` gives the same head.

    Returns:
        None if the adapter is not plain (DoRA, biases, modules of its own, embeddings) or has no safetensors
        file. mergekit then merges it into its base.

    Raises:
        InputError: a file of the adapter cannot be read.
    """
    path = directory / "adapter_model.safetensors"
    try:
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{directory / 'adapter_config.json'}: cannot be read: {error}") from error
    if not path.exists() or not _is_plain(config):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            modules = {n.removesuffix(".lora_A.weight") for n in names if ".lora_A." in n}
            pairs = {m: (f"{m}.lora_A.weight", f"{m}.lora_B.weight") for m in modules}
            factored = {name for pair in pairs.values() for name in pair}
            if not names.issuperset(factored):
                return None
            if not all(_is_of_base(n, file.get_tensor(n), base) for n in names - factored):
                return None
            return {
                f"{m.removeprefix(_PREFIX)}.weight": Factors.of_adapter(
                    file.get_tensor(b), file.get_tensor(a), _scale(m.removeprefix(_PREFIX), config)
                )
                for m, (a, b) in pairs.items()
            }
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def write_adapter(out: Path, base: str, weights: Mapping[str, Factors], dtype: torch.dtype) -> None:
    """Write a plain LoRA adapter: `adapter_model.safetensors`, then `adapter_config.json`.

    Args:
        out: the directory of the adapter.
        base: the name of the base model.
        weights: the factors by the name of the weight `[out, in]` to which they add; they may differ in rank.
        dtype: the dtype of the factors in the file.

    Raises:
        InputError: a finite number is infinite in `dtype`.
        OutputError: the directory cannot be written.
    """
    tensors, ranks = {}, {}
    for name, factors in weights.items():
        module = name.removesuffix(".weight")
        root = factors.scales.abs().sqrt()
        halves = {
            "lora_A": (factors.right * root).T.contiguous(),
            "lora_B": factors.left * root * factors.scales.sign(),
        }
        for half, tensor in halves.items():
            key = f"{_PREFIX}{module}.{half}.weight"
            tensors[key] = narrowed(tensor, dtype, key)
        ranks[module] = factors.rank
    largest = max(ranks.values())
    pattern = {module: rank for module, rank in ranks.items() if rank != largest}
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": largest,
        "lora_alpha": largest,  # the scale is in the factors
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
        (out / "adapter_config.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror}") from error


def changes_base(config: PeftConfig) -> bool:
    """Tell whether PEFT computes other weights of the base when it loads a LoRA adapter, as PiSSA does."""
    return getattr(config, "init_lora_weights", True) not in _INITIAL


def _is_plain(config: dict[str, Any]) -> bool:
    """Tell whether an adapter adds scale · B A to matrices and changes nothing else."""
    if config.get("peft_type") != "LORA" or config.get("init_lora_weights", True) not in _INITIAL:
        return False
    others = (field for field in dataclasses.fields(LoraConfig) if field.name not in _FREE)
    return all((config.get(f.name) or None) in (None, f.default) for f in others)


def _is_of_base(name: str, tensor: Tensor, base: Callable[[str], Tensor | None] | None) -> bool:
    """Tell whether a tensor of an adapter's file equals a weight of the base."""
    weight = base(name.removeprefix(_PREFIX).replace(".base_layer.", ".")) if base else None
    return weight is not None and weight.shape == tensor.shape and bool((weight == tensor).all())


def _scale(module: str, config: dict[str, Any]) -> float:
    """Compute alpha / r, or alpha / √r for rank-stabilised adapters, with the module's own alpha and r."""
    rank = _pattern(config.get("rank_pattern"), module, config.get("r", LoraConfig.r))
    alpha = _pattern(
        config.get("alpha_pattern"), module, config.get("lora_alpha", LoraConfig.lora_alpha)
    )
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _pattern(patterns: dict[str, float] | None, module: str, default: float) -> float:
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default
