"""Checkpoints as they are on disk or on the Hub: directories, tokenizers, and single weights."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from mergekit_mediator.errors import ArtifactError


class DenseCheckpoint:
    """The weights of the dense expert, memory-mapped."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def weight(self, name: str) -> Tensor:
        """A weight as stored.

        Raises:
            ArtifactError: the checkpoint has none of that name.
        """
        if name not in self._shards:
            raise ArtifactError(f"{self._root}: {name} is routed, but not in the dense checkpoint")
        weight: Tensor = self._shards[name].get_tensor(name)
        return weight

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight, from the headers."""
        files = self._shards.items()
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in files}

    @cached_property
    def _shards(self) -> dict[str, Any]:
        """The open files by weight."""
        shards = {}
        for path in sorted(self._root.glob("*.safetensors")):
            file: Any = safe_open(path, framework="pt")
            shards.update(dict.fromkeys(file.keys(), file))
        return shards


def load_plain(source: str | Path, dtype: str = "auto") -> PreTrainedModel:
    """An ordinary causal language model, in its stored dtype unless another one is named.

    Raises:
        ArtifactError: it cannot be loaded.
    """
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{source}: cannot be loaded: {str(error).splitlines()[0]}") from error
    plain: PreTrainedModel = model.eval()
    return plain


def stock_config(root: Path) -> PretrainedConfig | None:
    """The configuration of a checkpoint, or None if `load_plain` could make no model of it."""
    skeletons: Any = AutoModelForCausalLM
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(root, trust_remote_code=False)
        with torch.device("meta"):
            skeletons.from_config(config, trust_remote_code=False)
    except (OSError, ValueError):
        return None
    return config


def local_directory(source: str | Path, revision: str | None) -> Path:
    """The directory of an artifact, downloaded if it is not one.

    Raises:
        ArtifactError: there is neither a directory nor a repository of that name.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(str(source), revision=revision))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ArtifactError(
            f"{source}: neither a directory nor a repository on the Hub: {error}"
        ) from error


def load_tokenizer(root: Path) -> Any:
    """The tokenizer of a checkpoint, or None if it has none."""
    names = ("tokenizer.json", "tokenizer_config.json")
    return AutoTokenizer.from_pretrained(root) if any((root / n).exists() for n in names) else None
