"""SparseTensor to bytes and back: the one place that knows how a stored weight is laid out.

Layout 1, for a weight that keeps k coordinates: k positions (int32, or int64 for weights of 2^31
coordinates or more), then k codes (the weight's dtype for `exact`, int8 for `int8` and `sign`, two to a
byte and low half first for `int4`), all little-endian. The description says how to read it.
"""

import math
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from mergekit_mediator.errors import ArtifactError
from mergekit_mediator.sparse import SparseTensor, Values

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class Description(BaseModel):
    """What must be known of one stored weight before its bytes are read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[int, ...]
    dtype: str
    values: Values
    count: int = Field(ge=0)
    scale: float = Field(default=1.0, ge=0, allow_inf_nan=False)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def position_bytes(self) -> int:
        return self.count * (4 if self.numel < 2**31 else 8)

    @property
    def code_bytes(self) -> int:
        if self.values == "exact":
            return self.count * _DTYPES[self.dtype].itemsize
        return (self.count + 1) // 2 if self.values == "int4" else self.count


def encode_bytes(sparse: SparseTensor) -> tuple[Tensor, Description]:
    """The stored form `[bytes]` uint8 of a sparse tensor, and its description."""
    codes = _pack_int4(sparse.codes) if sparse.values == "int4" else sparse.codes
    stream = torch.cat([_as_bytes(sparse.positions), _as_bytes(codes)])
    return stream, Description(
        shape=sparse.shape,
        dtype=str(sparse.dtype).removeprefix("torch."),
        values=sparse.values,
        count=sparse.positions.numel(),
        scale=sparse.scale,
    )


def decode_bytes(stream: Tensor, description: Description, where: str) -> SparseTensor:
    """The sparse tensor of a stored form.

    Args:
        stream: `[bytes]` uint8.
        description: as written beside it; see `parse_description`.
        where: the file and tensor, for error messages.

    Raises:
        ArtifactError: the bytes do not fit the description, or the positions do not ascend within the shape.
    """
    d = description
    expected = d.position_bytes + d.code_bytes
    if stream.numel() != expected:
        raise ArtifactError(f"{where}: {expected} bytes expected, got {stream.numel()}")
    index_dtype = torch.int32 if d.numel < 2**31 else torch.int64
    positions = stream[: d.position_bytes].clone().view(index_dtype)
    if d.count and (
        int(positions[0]) < 0
        or int(positions[-1]) >= d.numel
        or bool((positions[1:] <= positions[:-1]).any())
    ):
        raise ArtifactError(f"{where}: positions must ascend from 0 to below {d.numel}")
    raw = stream[d.position_bytes :].clone()
    if d.values == "exact":
        codes = raw.view(_DTYPES[d.dtype])
    else:
        codes = _unpack_int4(raw, d.count) if d.values == "int4" else raw.view(torch.int8)
    return SparseTensor(d.shape, _DTYPES[d.dtype], d.values, positions, codes, d.scale)


def parse_description(fields: Any, where: str) -> Description:
    """Check a description that was read from a file.

    Raises:
        ArtifactError: a field is missing, unknown or out of range.
    """
    try:
        d = Description.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{where}: {field}: {first['msg']}") from error
    if d.dtype not in _DTYPES:
        raise ArtifactError(f"{where}: dtype {d.dtype!r} is none of {', '.join(_DTYPES)}")
    if any(size < 0 for size in d.shape) or d.numel >= 2**63:
        raise ArtifactError(f"{where}: shape {list(d.shape)} is out of range")
    if d.count > d.numel:
        raise ArtifactError(f"{where}: {d.count} coordinates do not fit shape {list(d.shape)}")
    return d


def _as_bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def _pack_int4(codes: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(codes, (0, codes.numel() % 2)).view(torch.uint8) & 15
    return padded[0::2] | (padded[1::2] << 4)


def _unpack_int4(stream: Tensor, count: int) -> Tensor:
    halves = torch.stack([stream & 15, stream >> 4], dim=1).view(torch.int8).reshape(-1)[:count]
    return torch.where(halves > 7, halves - 16, halves)
