"""Checkpoints as they are on disk or on the Hub: directories, tokenizers, and single weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
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
from mergekit_mediator.remote_code import is_ours


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


@contextmanager
def consent(source: str | Path) -> Iterator[None]:
    """Says on one line that a checkpoint needs code of its own, where the user has not allowed that.

    Raises:
        ArtifactError: transformers would not go on without `trust_remote_code`.
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ArtifactError(
            f"{source}: needs code that comes with it, which runs only where you allow it: read its .py "
            "files, then pass trust_remote_code=True, or --trust-remote-code to a command"
        ) from error


def load_config(source: str | Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a checkpoint.

    Args:
        source: a directory, or a repository's name on the Hub.
        trust_remote_code: let code that comes with it run.

    Raises:
        ArtifactError: it cannot be loaded, or only with code that may not run.
    """
    try:
        with consent(source):
            config: PretrainedConfig = AutoConfig.from_pretrained(
                source, trust_remote_code=bool(trust_remote_code)
            )
    except (OSError, ValueError) as error:
        raise _unloadable(source, error) from error
    return config


def load_model(
    source: str | Path, config: PretrainedConfig, trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """The causal language model of a checkpoint; of an artifact the dense expert, routed by nothing.

    Args:
        source: a directory, or a repository's name on the Hub.
        config: of the checkpoint.
        trust_remote_code: let code that comes with it run.
        kwargs: as for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ArtifactError: it can be loaded only with code that may not run.
    """
    with consent(source):
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, trust_remote_code=_trusted(config, trust_remote_code), **kwargs
        )
    own = vars(model).get("generate")
    if isinstance(own, partial) and own.func.__module__ == "mergekit_mediator.remote":
        del model.generate  # of the artifact's remote code, which would route
    loaded: PreTrainedModel = model.eval()
    return loaded


def load_plain(
    source: str | Path, dtype: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """An ordinary causal language model, in its stored dtype unless another one is named.

    Raises:
        ArtifactError: it cannot be loaded, or only with code that may not run.
    """
    config = load_config(source, trust_remote_code)
    try:
        return load_model(source, config, trust_remote_code, dtype=dtype)
    except (OSError, ValueError) as error:
        raise _unloadable(source, error) from error


def stock_config(root: Path, trust_remote_code: bool = False) -> PretrainedConfig | None:
    """The configuration of a checkpoint, or None if `load_plain` could make no model of it."""
    skeletons: Any = AutoModelForCausalLM
    try:
        config = load_config(root, trust_remote_code)
        with torch.device("meta"):
            skeletons.from_config(config, trust_remote_code=_trusted(config, trust_remote_code))
    except (OSError, ValueError, ArtifactError):
        return None
    return config


def _trusted(config: Any, trust_remote_code: bool) -> bool:
    """Whether a model's own code may run: never this package's, which would load the routed model."""
    named = getattr(config, "auto_map", None) or {}
    return bool(trust_remote_code) and not is_ours(named.get("AutoModelForCausalLM"))


def _unloadable(source: str | Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{source}: cannot be loaded: {str(error).splitlines()[0]}")


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


def load_tokenizer(root: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint, or None if it has none.

    Raises:
        ArtifactError: it can be loaded only with code that may not run.
    """
    names = ("tokenizer.json", "tokenizer_config.json")
    if not any((root / name).exists() for name in names):
        return None
    with consent(root):
        return AutoTokenizer.from_pretrained(root, trust_remote_code=bool(trust_remote_code))
