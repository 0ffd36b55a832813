"""A whole model as a GGUF file, as llama.cpp's `convert_hf_to_gguf.py` writes it, tensor by tensor."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_mediator.export.gguf.file import GgufTensor, file_type, write_gguf
from mergekit_mediator.export.gguf.layout import Layout, NotInGgufError, gguf_package
from mergekit_mediator.export.gguf.vocabulary import Vocabulary
from mergekit_mediator.models.loading import DenseCheckpoint
from mergekit_mediator.models.modules import is_tied

# Gemma's norms, vocabulary and windows have other rules in GGUF.
_WHOLE = ("llama", "qwen2", "qwen3")
_ROPES = ("default", "linear", "llama3")


class GgufModel:
    """A checkpoint that can be written as GGUF, also with other values in its weights."""

    def __init__(self, root: Path) -> None:
        """Read configuration, tokenizer, and the names and shapes of the weights.

        Args:
            root: the checkpoint's directory.

        Raises:
            NotInGgufError: the architecture, a setting of it, a weight or the tokenizer is none that this package
                writes.
            ExportError: the checkpoint cannot be read.
        """
        self._layout = Layout.of(root)
        self._rope = _rope(self._layout)
        self._checkpoint = DenseCheckpoint(root)
        self._dtypes: dict[str, torch.dtype] = {}
        for name, dtype in self._checkpoint.dtypes.items():
            if not isinstance(dtype, torch.dtype):
                raise NotInGgufError(
                    f"{name}: float32, float16 or bfloat16 is required, got {dtype}"
                )
            self._dtypes[name] = dtype
        self._shapes = dict(self._checkpoint.shapes)
        if is_tied(root):
            self._shapes.pop("lm_head.weight", None)
        self._names = {weight: self._layout.name(weight) for weight in self._shapes}
        self._vocabulary = Vocabulary.of(root, self._layout.config.vocab_size)

    def write(self, path: Path, weight: Callable[[str], Tensor], name: str) -> None:
        """Write the model; norms and biases become float32, all else keeps its dtype.

        Args:
            path: the file.
            weight: gives the values of a weight of the checkpoint by its name.
            name: the model's name, for the file's fields.

        Raises:
            ExportError: the file cannot be written.
        """
        tensors = [self._tensor(*item, weight) for item in self._shapes.items()]
        if self._rope is not None:
            rope, shape = self._rope, tuple(self._rope.shape)
            tensors.insert(0, GgufTensor("rope_freqs.weight", shape, torch.float32, lambda: rope))

        def set_fields(writer: Any) -> None:
            writer.add_type(gguf_package().GGUFType.MODEL)
            writer.add_name(name)
            matrices = (t for t, shape in self._shapes.items() if len(shape) > 1)
            writer.add_file_type(file_type(self._dtypes[next(matrices)]))
            _set_architecture(writer, self._layout)
            self._vocabulary.set_fields(writer)

        write_gguf(path, self._layout.architecture, set_fields, tensors)

    def _tensor(
        self, weight: str, shape: tuple[int, ...], read: Callable[[str], Tensor]
    ) -> GgufTensor:
        dtype = self._dtypes[weight] if len(shape) > 1 else torch.float32
        ordered = partial(self._ordered, weight, read)
        return GgufTensor(self._names[weight], shape, dtype, ordered)

    def _ordered(self, weight: str, read: Callable[[str], Tensor]) -> Tensor:
        return self._layout.ordered(weight, read(weight))


def _set_architecture(writer: Any, layout: Layout) -> None:
    """Give a writer the sizes of the model."""
    config, size = layout.config, layout.head_dim
    rope = config.rope_parameters
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf_package().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _rope(layout: Layout) -> Tensor | None:
    """Check the settings that GGUF has no field for; return the factors `[d/2]` of Llama 3's rotation, or None.

    Raises:
        NotInGgufError: a setting is none that this package writes.
    """
    config, architecture = layout.config, layout.architecture
    if architecture not in _WHOLE:
        raise NotInGgufError(
            f"{architecture}: this package writes adapters of it, and no whole model"
        )
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in _ROPES or rope.get("partial_rotary_factor", 1) != 1:
        raise NotInGgufError(f"rope_parameters: {', '.join(_ROPES)} is required, got {rope}")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise NotInGgufError(
            f"sliding_window: attention to the whole text is required, got {window}"
        )
    if config.hidden_act != "silu":
        raise NotInGgufError(f"hidden_act: silu is required, got {config.hidden_act}")
    return _llama3(layout) if kind == "llama3" else None


def _llama3(layout: Layout) -> Tensor:
    """Compute by how much each frequency of the rotation is divided (`_compute_llama3_parameters` in transformers).

    Long waves are divided by `factor`, short ones by 1, and those between by a number between.
    """
    rope, size = layout.config.rope_parameters, layout.head_dim
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    powers = torch.arange(0, size, 2, dtype=torch.float32) / size
    waves = 2 * math.pi * rope["rope_theta"] ** powers
    smooth = (rope["original_max_position_embeddings"] / waves - low) / (high - low)
    return 1 / torch.lerp(torch.tensor(1 / rope["factor"]), torch.tensor(1.0), smooth.clamp(0, 1))
