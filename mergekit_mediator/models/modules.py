"""The kinds of modules that a checkpoint's weights belong to, without loading any weight."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mergekit_mediator.errors import ArtifactError, first_line

# `transposed` is a linear layer that stores its matrix as `[in, out]`, as GPT-2 does.
Kind = Literal["linear", "transposed", "embedding", "other"]


def weight_kinds(root: Path) -> dict[str, Kind]:
    """The kind of module that uses each parameter named `weight`, by the parameter's name.

    A tied weight is listed under the names of all modules that use it.

    Raises:
        ArtifactError: transformers knows no such causal language model.
    """
    model_class: Any = AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(root, trust_remote_code=False)
        with torch.device("meta"):
            model: nn.Module = model_class.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{root}: no causal language model that transformers knows: {first_line(error)}"
        ) from error
    return {
        f"{name}.weight": _kind(module)
        for name, module in model.named_modules()
        if "weight" in module._parameters
    }


def _kind(module: nn.Module) -> Kind:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "transposed" if type(module).__name__ == "Conv1D" else "other"
