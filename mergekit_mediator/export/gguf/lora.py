"""A LoRA adapter as a GGUF file, as llama.cpp's `convert_lora_to_gguf.py` writes it."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mergekit_mediator.errors import ExportError
from mergekit_mediator.export.adapter import Adapter, Factors
from mergekit_mediator.export.gguf.file import GgufTensor, write_gguf
from mergekit_mediator.export.gguf.layout import Layout, gguf_package
from mergekit_mediator.export.peft_lora import Holdable
from mergekit_mediator.models.modules import is_tied

_LACKS = "are no matrices of linear layers, which alone a GGUF adapter holds beside an embedding that is not also the head"


def holdable_in_gguf(root: Path, embeddings: bool = True) -> Holdable:
    """Find the modules that a GGUF adapter can change.

    A tied embedding is none of them: llama.cpp adds the change of an embedding to the input alone, and stops with
    a failed assertion where the same weight is the head.

    Args:
        root: the checkpoint's directory.
        embeddings: whether adapters may change the embedding and the head.
    """
    return Holdable.of(root, embeddings and not is_tied(root))


def as_gguf_adapter(adapter: Adapter) -> Adapter:
    """Give every module of an adapter the same rank, and say what GGUF lacks."""
    return replace(adapter, lacks=_LACKS).of_one_rank()


def write_gguf_lora(
    adapter: Adapter, path: Path, layout: Layout, dtype: torch.dtype, name: str
) -> None:
    """Write an adapter of one rank.

    Args:
        adapter: an adapter with at least one module.
        path: the file.
        layout: the layout of the model.
        dtype: the dtype of the written factors.
        name: the adapter's name, for the file's fields.

    Raises:
        NotInGgufError: the architecture has no such weight.
        ExportError: the adapter has no module, or the file cannot be written.
    """
    if not adapter.modules:
        raise ExportError(
            f"{path}: an adapter needs a changed linear or embedding layer, got none: serve this expert "
            "with MediatorModel"
        )

    def set_fields(writer: Any) -> None:
        writer.add_type(gguf_package().GGUFType.ADAPTER)
        writer.add_name(name)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(adapter.rank))  # the factors hold the scale

    tensors: list[GgufTensor] = []
    for module, factors in adapter.modules.items():
        tensors += _pair(f"{module}.weight", factors, layout, dtype)
    write_gguf(path, layout.architecture, set_fields, tensors)


def _pair(weight: str, factors: Factors, layout: Layout, dtype: torch.dtype) -> list[GgufTensor]:
    """Return A `[r, in]` and B `[out, r]`; of an embedding, A `[vocabulary, r]` and B `[hidden, r]`."""
    product = factors.low_rank
    if factors.kind == "embedding":
        pair = {"a": product.left, "b": product.right}
    else:
        pair = {"a": product.right.T, "b": layout.ordered(weight, product.left)}
    name = layout.name(weight)
    return [
        GgufTensor(f"{name}.lora_{end}", tuple(factor.shape), dtype, partial(factor.to, dtype))
        for end, factor in pair.items()
    ]
