"""The kind of module that each weight of a checkpoint belongs to. No weight is loaded."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mergekit_mediator.errors import ArtifactError, first_line

# `transposed` is a linear layer that stores its matrix as `[in, out]`, as GPT-2 does.
Kind = Literal["linear", "transposed", "embedding", "other"]


def weight_kinds(root: Path) -> dict[str, Kind]:
    """Return the kind of module that uses each parameter named `weight`.

    Args:
        root: the directory of the checkpoint.

    Returns:
        By the parameter's full name. A tied weight is listed under the names of all modules that use it.

    Raises:
        ArtifactError: transformers knows no causal language model for the configuration.
    """
    return {
        f"{name}.weight": _kind(module)
        for name, module in skeleton(root).named_modules()
        if "weight" in module._parameters
    }


def input_embedding(root: Path) -> str:
    """Return the name of the weight of the input embedding.

    Raises:
        ArtifactError: see `weight_kinds`.
    """
    model = skeleton(root)
    table = model.get_input_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is table)


def is_tied(root: Path) -> bool:
    """Tell whether the input embedding of a checkpoint is also its head.

    Raises:
        ArtifactError: see `weight_kinds`.
    """
    config = skeleton(root).config.get_text_config()
    return bool(getattr(config, "tie_word_embeddings", False))


def skeleton(root: Path) -> PreTrainedModel:
    """Make the model of a checkpoint on the meta device, without its weights.

    Raises:
        ArtifactError: see `weight_kinds`.
    """
    model_class: Any = AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(root, trust_remote_code=False)
        with torch.device("meta"):
            model: PreTrainedModel = model_class.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{root}: a causal language model that transformers knows required: {first_line(error)}"
        ) from error
    return model


def _kind(module: nn.Module) -> Kind:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "transposed" if type(module).__name__ == "Conv1D" else "other"
