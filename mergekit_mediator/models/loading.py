"""Checkpoints on disk or on the Hub: their directories, models, tokenizers and single weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from mergekit_mediator.errors import ArtifactError, first_line
from mergekit_mediator.remote_code import is_ours

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class DenseCheckpoint:
    """The weights of the dense expert, memory-mapped."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def weight(self, name: str) -> Tensor:
        """Return a weight in its stored dtype.

        Raises:
            ArtifactError: the checkpoint has no weight of that name.
        """
        if name not in self._shards:
            raise ArtifactError(
                f"{self._root}: the dense checkpoint lacks the routed weight {name}: merge again, or "
                "download the artifact again"
            )
        weight: Tensor = self._shards[name].get_tensor(name)
        return weight

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight, by name, from the files' headers."""
        files = self._shards.items()
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in files}

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype | str]:
        """The dtype of every weight, by name, from the files' headers; one without floating point by its own name."""
        files = self._shards.items()
        named = {name: str(file.get_slice(name).get_dtype()) for name, file in files}
        return {name: _FLOATS.get(dtype, dtype) for name, dtype in named.items()}

    @cached_property
    def _shards(self) -> dict[str, Any]:
        """By weight, the open file that holds it."""
        shards = {}
        for path in sorted(self._root.glob("*.safetensors")):
            file: Any = safe_open(path, framework="pt")
            shards.update(dict.fromkeys(file.keys(), file))
        return shards


@contextmanager
def consent(source: str | Path) -> Iterator[None]:
    """Turn transformers' request for `trust_remote_code` into an error of one line.

    Args:
        source: the checkpoint that is loaded inside the context, for the message.

    Raises:
        ArtifactError: the checkpoint needs code of its own, and the user has not allowed it to run.
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
    """Load the configuration of a checkpoint.

    Args:
        source: a directory, or a repository's name on the Hub.
        trust_remote_code: allow the checkpoint's own code to run.

    Raises:
        ArtifactError: the configuration cannot be loaded, or needs code that may not run.
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
    """Load the causal language model of a checkpoint; that of an artifact is the dense expert, without routing.

    Args:
        source: a directory, or a repository's name on the Hub.
        config: the configuration of the checkpoint.
        trust_remote_code: allow the checkpoint's own code to run; this package's remote code never runs.
        kwargs: as for `AutoModelForCausalLM.from_pretrained`.

    Returns:
        The model, in evaluation mode.

    Raises:
        ArtifactError: the model needs code that may not run.
    """
    with consent(source):
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, trust_remote_code=_trusted(config, trust_remote_code), **kwargs
        )
    generate = vars(model).get("generate")
    if isinstance(generate, partial) and generate.func.__module__ == "mergekit_mediator.remote":
        del model.generate  # this one comes from the artifact's remote code, and would route
    dense: PreTrainedModel = model.eval()
    return dense


def load_plain(
    source: str | Path, dtype: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load an ordinary causal language model.

    Args:
        source: a directory, or a repository's name on the Hub.
        dtype: the name of a dtype, or `auto` for the stored one.
        trust_remote_code: as for `load_model`.

    Raises:
        ArtifactError: the model cannot be loaded, or needs code that may not run.
    """
    config = load_config(source, trust_remote_code)
    try:
        return load_model(source, config, trust_remote_code, dtype=dtype)
    except (OSError, ValueError) as error:
        raise _unloadable(source, error) from error


def stock_config(root: Path, trust_remote_code: bool = False) -> PretrainedConfig | None:
    """Load the configuration of a checkpoint, if `load_plain` can make a model from it.

    Args:
        root: the directory of the checkpoint.
        trust_remote_code: as for `load_model`.

    Returns:
        None if it cannot.
    """
    skeletons: Any = AutoModelForCausalLM
    try:
        config = load_config(root, trust_remote_code)
        with torch.device("meta"):
            skeletons.from_config(config, trust_remote_code=_trusted(config, trust_remote_code))
    except (OSError, ValueError, ArtifactError):
        return None
    return config


def _trusted(config: Any, trust_remote_code: bool) -> bool:
    """Tell whether a model's own code may run: this package's never may, as it loads the routed model."""
    auto_map = getattr(config, "auto_map", None) or {}
    return bool(trust_remote_code) and not is_ours(auto_map.get("AutoModelForCausalLM"))


def _unloadable(source: str | Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{source}: cannot be loaded: {first_line(error)}")


def load_tokenizer(root: Path, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a checkpoint.

    Args:
        root: the directory of the checkpoint.
        trust_remote_code: allow the checkpoint's own code to run.

    Returns:
        None if the checkpoint has no tokenizer.

    Raises:
        ArtifactError: the tokenizer needs code that may not run.
    """
    names = ("tokenizer.json", "tokenizer_config.json")
    if not any((root / name).exists() for name in names):
        return None
    with consent(root):
        return AutoTokenizer.from_pretrained(root, trust_remote_code=bool(trust_remote_code))
