"""A LoRA adapter: thin factors by module, written as PEFT and vLLM read them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_mediator.errors import ExportError, first_line
from mergekit_mediator.export.low_rank import LowRank, side_by_side, squared_norm
from mergekit_mediator.export.rank import RankChoice
from mergekit_mediator.models.modules import Kind

_PREFIX = "base_model.model."
# The key of the file's metadata that holds the squares of each module, and the dropped weights.
_ABOUT = "mergekit_mediator"
_NAMES = {"embedding": ("lora_embedding_A", "lora_embedding_B")}


@dataclass(frozen=True)
class Factors:
    """The change of one module's matrix `[out, in]`: `left @ right.T`.

    Attributes:
        kind: the module's kind. The matrix of an embedding is `[vocabulary, hidden]`.
        low_rank: the factors.
    """

    kind: Kind
    low_rank: LowRank


@dataclass(frozen=True)
class Adapter:
    """The part of an expert's or a blend's change that thin factors hold.

    Attributes:
        modules: the factors by module name, such as `model.layers.0.mlp.down_proj`.
        dropped: the names of changed weights that an adapter cannot hold: norms, biases, and weights that
            belong to no module.
        dropped_energy: the squared norm of the dropped weights' changes.
        lacks: what no LoRA adapter holds, in words.
        choice: why the rank is what it is, if it was chosen.
        base_square: the squared norm of the weights that the modules change; 0 if it is unknown.
    """

    modules: Mapping[str, Factors]
    dropped: tuple[str, ...] = ()
    dropped_energy: float = 0.0
    lacks: str = "are no matrices of linear layers or embeddings, which alone a LoRA adapter holds"
    choice: RankChoice | None = None
    base_square: float = 0.0

    @property
    def rank(self) -> int:
        """The largest rank of any module; 0 without modules."""
        return max((factors.low_rank.rank for factors in self.modules.values()), default=0)

    @property
    def squared_norm(self) -> float:
        """The squared norm of the modules' exact change."""
        return sum(factors.low_rank.squared_norm for factors in self.modules.values())

    @property
    def squared_error(self) -> float:
        """The part of the modules' squared change that the factors lose, in [0, 1]."""
        error = sum(factors.low_rank.squared_error for factors in self.modules.values())
        return error / self.squared_norm if self.squared_norm else 0.0

    @property
    def change_over_base(self) -> float:
        """The squared norm of the change over that of the weights that it changes; 0 if the latter is unknown."""
        return self.squared_norm / self.base_square if self.base_square else 0.0

    def changes(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the change of each module's weight by name, in the weight's shape, float32."""
        for module, factors in self.modules.items():
            yield f"{module}.weight", factors.low_rank.left @ factors.low_rank.right.T

    def of_one_rank(self) -> "Adapter":
        """Return the same change with the largest rank in every module, for engines that know one rank only."""
        rank = self.rank
        padded = {
            module: replace(factors, low_rank=factors.low_rank.padded(rank))
            for module, factors in self.modules.items()
        }
        return replace(self, modules=padded)


def blend(parts: Sequence[tuple[float, Adapter]], rank: int) -> Adapter:
    """Return the weighted sum of adapters, and cut a module whose ranks together exceed the largest rank.

    Args:
        parts: the weight and the adapter of each expert.
        rank: the largest rank of a module.
    """
    by_module: dict[str, list[tuple[float, Factors]]] = {}
    for weight, adapter in parts:
        for module, factors in adapter.modules.items():
            by_module.setdefault(module, []).append((weight, factors))
    modules = {}
    for module, terms in by_module.items():
        left, right = side_by_side([(w, f.low_rank.left, f.low_rank.right) for w, f in terms])
        norm = squared_norm(left, right)
        modules[module] = Factors(terms[0][1].kind, LowRank(left, right, norm, 0.0).cut(rank))
    dropped = dict.fromkeys(name for _, adapter in parts for name in adapter.dropped)
    return Adapter(
        modules,
        tuple(dropped),
        sum(w * w * adapter.dropped_energy for w, adapter in parts),
        base_square=max(adapter.base_square for _, adapter in parts),
    )


def write_peft(
    adapter: Adapter, out: Path, base: str, dtype: torch.dtype, config: Mapping[str, Any] = {}
) -> None:
    """Write an adapter as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        adapter: an adapter with at least one module.
        out: the directory to create.
        base: the configuration's name of the model that the adapter is added to.
        dtype: the dtype of the written factors.
        config: further fields of the configuration.

    Raises:
        ExportError: the adapter has no module, or the directory cannot be written.
    """
    if not adapter.modules:
        raise ExportError(
            f"{out}: an adapter needs a changed linear or embedding layer, got none: serve this expert "
            "with MediatorModel"
        )
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    modules = adapter.modules.items()
    for module, factors in modules:
        first, second = _NAMES.get(factors.kind, ("lora_A", "lora_B"))
        suffix = "" if factors.kind == "embedding" else ".weight"
        a, b = _as_peft(factors)
        # tied modules share factors, which safetensors does not write twice
        tensors[f"{_PREFIX}{module}.{first}{suffix}"] = a.to(dtype, copy=True).contiguous()
        tensors[f"{_PREFIX}{module}.{second}{suffix}"] = b.to(dtype, copy=True).contiguous()
        ranks[module] = factors.low_rank.rank
    largest = max(ranks.values())
    pattern = {module: rank for module, rank in ranks.items() if rank != largest}
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": largest,
        "lora_alpha": largest,  # the factors hold the scale
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(f.kind == "transposed" for f in adapter.modules.values()),
        "inference_mode": True,
        **config,
    }
    text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    squares = {m: [f.low_rank.squared_norm, f.low_rank.squared_error] for m, f in modules}
    about = {
        "squares": squares,
        "dropped": adapter.dropped,
        "energy": adapter.dropped_energy,
        "base_square": adapter.base_square,
    }
    metadata = {"format": "pt", _ABOUT: json.dumps(about)}
    try:
        out.mkdir(parents=True)
        save_file(tensors, out / "adapter_model.safetensors", metadata=metadata)
        (out / "adapter_config.json").write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{out}: cannot be written: {first_line(error)}") from error


def read_peft(folder: Path) -> Adapter:
    """Read an adapter that `write_peft` wrote.

    Raises:
        ExportError: the adapter cannot be read.
    """
    path = folder / "adapter_model.safetensors"
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = json.loads(file.metadata()[_ABOUT])
        modules = {
            module: _from_peft(module, tensors, norm, error)
            for module, (norm, error) in about["squares"].items()
        }
        return Adapter(
            modules,
            tuple(about["dropped"]),
            about["energy"],
            base_square=about.get("base_square", 0.0),  # files of earlier versions lack it
        )
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ExportError(
            f"{path}: cannot be read as an adapter of mergekit-mediator: {first_line(error)}: delete the "
            "folder, and it is written again"
        ) from error


def _from_peft(
    module: str, tensors: Mapping[str, Tensor], squared_norm: float, squared_error: float
) -> Factors:
    """Read a module's factors from PEFT's tensors; a transposed matrix comes back as a linear one."""
    kind: Kind = "linear"
    start = f"{_PREFIX}{module}.lora_"
    if f"{start}A.weight" in tensors:
        left, right = tensors[f"{start}B.weight"], tensors[f"{start}A.weight"].T
    else:
        kind = "embedding"
        left, right = tensors[f"{start}embedding_A"].T, tensors[f"{start}embedding_B"]
    return Factors(kind, LowRank(left.float(), right.float(), squared_norm, squared_error))


def _as_peft(factors: Factors) -> tuple[Tensor, Tensor]:
    """Return PEFT's A `[r, in]` and B `[out, r]`; of an embedding, A `[r, vocabulary]` and B `[hidden, r]`."""
    left, right = factors.low_rank.left, factors.low_rank.right
    if factors.kind in ("embedding", "transposed"):
        left, right = right, left
    return right.T, left
