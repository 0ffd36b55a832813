"""Experts as SHiRA adapters: the changed values of linear layers and their places, as PEFT reads them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from mergekit_mediator.errors import ExportError, first_line
from mergekit_mediator.export.experts import StoredExperts
from mergekit_mediator.export.peft_lora import Holdable
from mergekit_mediator.export.weight_patch import WeightPatch, weight_patches

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class SparseAdapter:
    """The part of an expert's change that lies in linear layers, value by value.

    Attributes:
        modules: the change of each module's matrix `[out, in]`, by module name.
        dropped: the names of the other changed weights: embeddings, norms, biases, weights without a module.
        dropped_energy: the squared norm of their change.
        lacks: what no SHiRA adapter holds, in words.
    """

    modules: Mapping[str, WeightPatch]
    dropped: tuple[str, ...]
    dropped_energy: float
    lacks: str = "are no matrices of linear layers, which alone a SHiRA adapter holds"

    def changes(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the change of each module's weight by name, in the weight's shape, float32."""
        for patch in self.modules.values():
            change = torch.zeros(patch.shape)
            change.view(-1)[patch.positions] = _difference(patch)
            yield patch.weight, change

    @property
    def rank(self) -> int:
        """The least r for which r·(in + out) values, PEFT's number for each module, are enough everywhere."""
        needed = (-(-len(p.positions) // sum(p.shape)) for p in self.modules.values())
        return max(needed, default=0)

    @property
    def squared_norm(self) -> float:
        """The squared norm of the modules' change."""
        return sum(_energy(patch) for patch in self.modules.values())

    @property
    def squared_error(self) -> float:
        """0: the adapter holds every changed value."""
        return 0.0


def to_sparse(experts: StoredExperts, name: str, holdable: Holdable) -> SparseAdapter:
    """Make the adapter of an expert.

    Args:
        experts: the artifact's experts, relative to its dense expert.
        name: the expert.
        holdable: the modules of the checkpoint.

    Raises:
        ExportError: the expert is unknown, changes no linear layer, or changes too many values of one; or the
            experts are relative to the base.
    """
    if experts.reference != "dense":
        raise ExportError(
            "a SHiRA adapter is added to the dense expert: relative to dense required"
        )
    modules: dict[str, WeightPatch] = {}
    dropped, energy = [], 0.0
    for patch in weight_patches(experts, {name: 1.0}):
        users = holdable.users.get(patch.weight, ())
        if holdable.kinds.get(patch.weight) == "linear" and len(users) == 1:
            modules[users[0]] = patch
        else:
            dropped.append(patch.weight)
            energy += _energy(patch)
    adapter = SparseAdapter(modules, tuple(dropped), energy)
    for module, patch in modules.items():
        out, width = patch.shape
        if adapter.rank * (out + width) > out * width:
            densest = max(modules, key=lambda m: len(modules[m].positions) / sum(modules[m].shape))
            raise ExportError(
                f"expert {name!r}: {densest} changes {len(modules[densest].positions):,} values, for which SHiRA "
                f"takes {adapter.rank * (out + width):,} values in {module}, which has {out * width:,}: export "
                "LoRA or a checkpoint, or merge with a lower density"
            )
    if not modules:
        raise ExportError(
            f"expert {name!r}: a SHiRA adapter needs a changed linear layer, got none: export a checkpoint"
        )
    return adapter


def write_shira(adapter: SparseAdapter, out: Path, base: str) -> None:
    """Write an adapter as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

    PEFT takes r·(in + out) values of every module, float32, and as many places, int32. Modules with fewer changes
    are filled up with zeros at place 0.

    Args:
        adapter: an adapter with at least one module.
        out: the directory to create.
        base: the configuration's name of the model that the adapter is added to.

    Raises:
        ExportError: the directory cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for module, patch in adapter.modules.items():
        width = patch.shape[1]
        places = torch.stack((patch.positions // width, patch.positions % width)).to(torch.int32)
        more = (0, adapter.rank * sum(patch.shape) - len(patch.positions))
        tensors[f"{_PREFIX}{module}.shira_weight"] = pad(_difference(patch), more)
        tensors[f"{_PREFIX}{module}.shira_indices"] = pad(places, more)
    fields = {
        "peft_type": "SHIRA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "mask_type": "stored",  # any other name than `random`: the places come from the file
        "target_modules": sorted(adapter.modules),
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    try:
        out.mkdir(parents=True)
        save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
        (out / "adapter_config.json").write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{out}: cannot be written: {first_line(error)}") from error


def _difference(patch: WeightPatch) -> Tensor:
    """The change of each value, `[k]` float32."""
    return patch.values.float() - patch.dense.float()


def _energy(patch: WeightPatch) -> float:
    return float(_difference(patch).double().square().sum())
