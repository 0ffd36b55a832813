"""A GGUF file: fields, and tensors that are read one at a time while they are written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_mediator.errors import ExportError, first_line
from mergekit_mediator.export.gguf.layout import gguf_package

# The dtypes that GGUF holds as they are, by their names there.
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file.

    Attributes:
        name: the tensor's name in GGUF.
        shape: the shape, the axis of neighbouring values last.
        dtype: a dtype of `DTYPES`.
        read: gives the values, in this shape.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def write_gguf(
    path: Path,
    architecture: str,
    set_fields: Callable[[Any], None],
    tensors: Sequence[GgufTensor],
) -> None:
    """Write a GGUF file, with one tensor in memory at a time.

    Args:
        path: the file.
        architecture: the architecture's name in GGUF.
        set_fields: gives a `gguf.GGUFWriter` the file's fields.
        tensors: the tensors, in the file's order.

    Raises:
        ExportError: `gguf` is not installed, or the file cannot be written.
    """
    gguf = gguf_package()
    writer = gguf.GGUFWriter(path, architecture)
    set_fields(writer)
    for tensor in tensors:
        kind = getattr(gguf.GGMLQuantizationType, DTYPES[tensor.dtype])
        size = torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
        writer.add_tensor_info(tensor.name, tensor.shape, None, size, kind)
    try:
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                values = tensor.read().to(tensor.dtype).contiguous()
                writer.write_tensor_data(values.view(-1).view(torch.uint8).numpy())
        finally:
            writer.close()
    except OSError as error:
        raise ExportError(f"{path}: cannot be written: {first_line(error)}") from error


def file_type(dtype: torch.dtype) -> int:
    """Return GGUF's number for a file whose matrices have a dtype."""
    kinds = gguf_package().LlamaFileType
    if dtype == torch.float32:
        return int(kinds.ALL_F32)
    return int(kinds.MOSTLY_F16 if dtype == torch.float16 else kinds.MOSTLY_BF16)
