"""A LoRA adapter: thin factors by module, written as PEFT and vLLM read them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_mediator.errors import ExportError
from mergekit_mediator.export.low_rank import LowRank, side_by_side
from mergekit_mediator.models.modules import Kind

_PREFIX = "base_model.model."
_NAMES = {"embedding": ("lora_embedding_A", "lora_embedding_B")}


@dataclass(frozen=True)
class Factors:
    """The change of one module: `left @ right.T` of its matrix `[out, in]`.

    Attributes:
        kind: of the module. The matrix of an embedding is `[vocabulary, hidden]`.
        low_rank: its factors.
    """

    kind: Kind
    low_rank: LowRank


@dataclass(frozen=True)
class Adapter:
    """The change that an expert or a blend makes, as far as thin factors hold it.

    Attributes:
        modules: by the module's name, such as `model.layers.0.mlp.down_proj`.
        dropped: the names of changed weights that an adapter cannot hold: norms, biases, and weights that are
            no module of their own.
        dropped_energy: the squared norm of their changes.
    """

    modules: Mapping[str, Factors]
    dropped: tuple[str, ...] = ()
    dropped_energy: float = 0.0

    @property
    def rank(self) -> int:
        """The largest rank of any module; 0 without modules."""
        return max((factors.low_rank.rank for factors in self.modules.values()), default=0)

    @property
    def squared_error(self) -> float:
        """The part of the squared change that is lost in the modules, in [0, 1]."""
        norm = sum(f.low_rank.squared_norm for f in self.modules.values())
        return sum(f.low_rank.squared_error for f in self.modules.values()) / norm if norm else 0.0


def blend(parts: Sequence[tuple[float, Adapter]], rank: int) -> Adapter:
    """The weighted sum of adapters, cut to a rank where the ranks of all together exceed it.

    Args:
        parts: the weight and the adapter of each expert.
        rank: the largest that is allowed.
    """
    by_module: dict[str, list[tuple[float, Factors]]] = {}
    for weight, adapter in parts:
        for module, factors in adapter.modules.items():
            by_module.setdefault(module, []).append((weight, factors))
    modules = {}
    for module, found in by_module.items():
        left, right = side_by_side([(w, f.low_rank.left, f.low_rank.right) for w, f in found])
        norm = float(
            ((left.double().T @ left.double()) * (right.double().T @ right.double())).sum()
        )
        modules[module] = Factors(found[0][1].kind, LowRank(left, right, norm, 0.0).cut(rank))
    dropped = dict.fromkeys(name for _, adapter in parts for name in adapter.dropped)
    return Adapter(modules, tuple(dropped), sum(w * w * a.dropped_energy for w, a in parts))


def write_peft(
    adapter: Adapter, out: Path, base: str, dtype: torch.dtype, config: Mapping[str, Any] = {}
) -> None:
    """Write an adapter as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        adapter: with at least one module.
        out: the directory to create.
        base: the model that the adapter is for, as the configuration names it.
        dtype: of the factors.
        config: more fields of the configuration.

    Raises:
        ExportError: the adapter changes no module.
    """
    if not adapter.modules:
        raise ExportError(f"{out}: nothing to write: no module is changed that an adapter can hold")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for module, factors in adapter.modules.items():
        first, second = _NAMES.get(factors.kind, ("lora_A", "lora_B"))
        suffix = "" if factors.kind == "embedding" else ".weight"
        a, b = _as_peft(factors)
        tensors[f"{_PREFIX}{module}.{first}{suffix}"] = a.to(dtype).contiguous()
        tensors[f"{_PREFIX}{module}.{second}{suffix}"] = b.to(dtype).contiguous()
        ranks[module] = factors.low_rank.rank
    largest = max(ranks.values())
    pattern = {module: rank for module, rank in ranks.items() if rank != largest}
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": largest,
        "lora_alpha": largest,  # the scale is in the factors
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(f.kind == "transposed" for f in adapter.modules.values()),
        "inference_mode": True,
        **config,
    }
    out.mkdir(parents=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    (out / "adapter_config.json").write_text(text, encoding="utf-8")


def read_peft(folder: Path) -> Adapter:
    """Read an adapter that `write_peft` wrote.

    Raises:
        ExportError: it cannot be read.
    """
    path = folder / "adapter_model.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path}: cannot be read: {error}") from error
    modules = {}
    for name, a in tensors.items():
        module, marker, end = name.removeprefix(_PREFIX).partition(".lora_")
        if marker and end in ("A.weight", "embedding_A"):
            kind: Kind = "embedding" if end == "embedding_A" else "linear"
            b = tensors[name.replace("_A", "_B")]
            left, right = (a.T, b) if kind == "embedding" else (b, a.T)
            modules[module] = Factors(kind, LowRank(left.float(), right.float(), 0.0, 0.0))
    return Adapter(modules)


def _as_peft(factors: Factors) -> tuple[Tensor, Tensor]:
    """PEFT's A `[r, in]` and B `[out, r]`; of an embedding, A is `[r, vocabulary]` and B `[hidden, r]`."""
    left, right = factors.low_rank.left, factors.low_rank.right
    if factors.kind in ("embedding", "transposed"):
        left, right = right, left
    return right.T, left
