"""The names and the order of rows of a model's weights in GGUF, the file format of llama.cpp.

llama.cpp turns pairs of neighbouring rows of a llama's queries and keys; transformers turns row i with row i + d/2
of a head of d rows. So these rows change places on the way (`LlamaModel.permute` in llama.cpp's conversion/llama.py).
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from mergekit_mediator.errors import ExportError, first_line
from mergekit_mediator.models.loading import load_config

# By the class in config.json: the architecture's name in GGUF, and whether llama.cpp turns neighbouring rows.
_ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", True),
    "MistralForCausalLM": ("llama", True),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
    "Gemma3ForCausalLM": ("gemma3", False),
}


class NotInGgufError(ExportError):
    """A model that this package does not write as GGUF; llama.cpp's own converter may."""

    def __init__(self, what: str) -> None:
        """Say what is not known, and name the converter.

        Args:
            what: the place, what is required and what was got.
        """
        super().__init__(
            f"{what}: export with --format checkpoint, and convert that with llama.cpp's "
            "`python convert_hf_to_gguf.py FOLDER`"
        )


def gguf_package() -> ModuleType:
    """Import the package `gguf`, which is part of llama.cpp.

    Raises:
        ExportError: it is not installed.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ExportError(
            f"the package {error.name} is required and not installed: run `pip install 'mergekit-mediator[gguf]'`"
        ) from error
    module: ModuleType = gguf
    return module


@dataclass(frozen=True)
class Layout:
    """The form of a model's weights in GGUF.

    Attributes:
        architecture: the name in GGUF, such as `llama`.
        turns_neighbours: whether rows of queries and keys change places.
        config: the configuration, as transformers reads it.
    """

    architecture: str
    turns_neighbours: bool
    config: Any

    @classmethod
    def of(cls, root: Path) -> "Layout":
        """Find the layout of a checkpoint.

        Args:
            root: the checkpoint's directory.

        Raises:
            NotInGgufError: the architecture is none that this package writes.
            ExportError: `config.json` cannot be read.
        """
        try:
            names = json.loads((root / "config.json").read_text(encoding="utf-8"))["architectures"]
            name = str(names[0])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ExportError(
                f"{root / 'config.json'}: the name of an architecture is required: {first_line(error)}"
            ) from error
        if name not in _ARCHITECTURES:
            raise NotInGgufError(
                f"{name}: this package writes GGUF for {', '.join(_ARCHITECTURES)}"
            )
        return cls(*_ARCHITECTURES[name], load_config(root))

    def name(self, weight: str) -> str:
        """Return the name of a weight in GGUF, such as `blk.0.attn_q.weight`.

        Raises:
            NotInGgufError: the architecture has no such weight.
        """
        name: str | None = self._names.get_name(weight, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise NotInGgufError(f"{weight}: {self.architecture} has no such weight in GGUF")
        return name

    def ordered(self, weight: str, rows: Tensor) -> Tensor:
        """Put the rows of a weight into llama.cpp's order.

        Args:
            weight: the weight's name.
            rows: the weight, or any tensor with a row for each of its rows.
        """
        module = weight.removesuffix(".weight").removesuffix(".bias").rsplit(".", 1)[-1]
        heads = {
            "q_proj": self.config.num_attention_heads,
            "k_proj": self.config.num_key_value_heads,
        }
        if not self.turns_neighbours or module not in heads:
            return rows
        return (
            rows.reshape(heads[module], 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
        )

    @property
    def head_dim(self) -> int:
        """The number of values of a head."""
        size = getattr(self.config, "head_dim", None)
        return int(size or self.config.hidden_size // self.config.num_attention_heads)

    @cached_property
    def _names(self) -> Any:
        gguf = gguf_package()
        architecture = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[self.architecture]
        return gguf.get_tensor_name_map(architecture, self.config.num_hidden_layers)
