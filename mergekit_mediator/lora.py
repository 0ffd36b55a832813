"""A LoRA adapter's own factors, where they are all that it changes."""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mergekit_mediator.errors import InputError
from mergekit_mediator.factors import Factors

# What changes a model otherwise than by adding scale · B A to matrices; their values where absent.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "layer_replication": (None, []),
    "lora_bias": (False,),
    "megatron_config": (None,),
    "modules_to_save": (None, []),
    "peft_type": ("LORA",),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "velora_config": (None,),
    "kasa_config": (None,),
}
_PREFIX = "base_model.model."


def read_adapter(directory: Path) -> dict[str, Factors] | None:
    """The factors of a plain LoRA adapter by the name of the weight `[out, in]` that they add to.

    None for an adapter that changes more than that (DoRA, biases, modules of its own, embeddings) or is
    not stored as safetensors: it is merged into its base instead.

    Raises:
        InputError: the adapter's files cannot be read.
    """
    path = directory / "adapter_model.safetensors"
    try:
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{directory / 'adapter_config.json'}: cannot be read: {error}") from error
    if not path.exists() or any(config.get(k, ok[0]) not in ok for k, ok in _PLAIN.items()):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            modules = {n.removesuffix(".lora_A.weight") for n in names if ".lora_A." in n}
            pairs = {m: (f"{m}.lora_A.weight", f"{m}.lora_B.weight") for m in modules}
            if names != {name for pair in pairs.values() for name in pair}:
                return None
            return {
                f"{m.removeprefix(_PREFIX)}.weight": Factors.of_adapter(
                    file.get_tensor(b), file.get_tensor(a), _scale(m.removeprefix(_PREFIX), config)
                )
                for m, (a, b) in pairs.items()
            }
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _scale(module: str, config: dict[str, Any]) -> float:
    """alpha / r, or alpha / √r for rank-stabilised adapters, with the module's own alpha and r."""
    rank = _pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _pattern(patterns: dict[str, float] | None, module: str, default: float) -> float:
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default
