"""What an expert file says about each stored weight, checked before anything is read by it (FORMAT.md)."""

import math
import reprlib
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergekit_mediator.delta.value_forms import Form
from mergekit_mediator.errors import ArtifactError

# The bytes of a number, by the name of its dtype in torch. This module imports no torch.
_DTYPES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_FACTOR_DTYPES = {"int8": 1, **_DTYPES}
# Below this density the low byte of a gap is as good as random and goes to a stream of its own.
_WIDE_GAPS_DENSITY = 1 / 256


class FactorsDescription(BaseModel):
    """What must be known of the low-rank part of a stored weight."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(gt=0)
    dtype: str
    paired: int = Field(default=0, ge=0)
    sizes: tuple[int, ...]


class Description(BaseModel):
    """What must be known of one stored weight before its bytes are read; see FORMAT.md."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[int, ...]
    dtype: str
    values: Form
    count: int = Field(ge=0)
    scale: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    shift: float = Field(default=0.0, allow_inf_nan=False)
    share: float = Field(default=0.0, allow_inf_nan=False)
    relative: bool = False
    implied: bool = False
    gaps: int = Field(default=0, ge=0)
    sizes: tuple[int, ...] = ()
    factors: FactorsDescription | None = None
    check: int = Field(default=0, ge=0, lt=2**32)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def wide(self) -> bool:
        return self.count < _WIDE_GAPS_DENSITY * self.numel

    @property
    def code_bytes(self) -> int:
        """The size of one code in memory."""
        if self.values == "exact":
            return _DTYPES[self.dtype]
        return 2 if self.values == "steps" else 1

    @property
    def heads(self) -> tuple[int, ...]:
        """The decoded sizes of the streams that hold positions; those that hold codes come after them."""
        if self.implied:
            return ()
        return (self.gaps, self.count) if self.wide else (self.gaps,)

    @property
    def most_gaps(self) -> int:
        """The largest decoded size that the first stream can have: a byte for each coordinate, and one more
        for each run of 255 that is left out (of 255 low bytes, if those have a stream of their own)."""
        return self.count + (self.numel - self.count) // (255 * (256 if self.wide else 1))

    @property
    def factor_numbers(self) -> int:
        """How many numbers the factors hold, without their scales."""
        if self.factors is None:
            return 0
        return self.factors.rank * (self.numel // max(1, self.shape[-1]) + self.shape[-1])


def parse_description(fields: Any, where: str, shape: tuple[int, ...] | None = None) -> Description:
    """Check a description that was read from a file: what is decoded by it is bounded by its shape.

    Args:
        fields: as decoded from JSON.
        where: the file and tensor, for error messages.
        shape: of the weight in the dense checkpoint, which bounds the description's own; None if that is
            not known.

    Raises:
        ArtifactError: a field is missing, unknown or out of range, or the shape is another one.
    """
    try:
        d = Description.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{where}: {field}: {first['msg']}") from error
    if shape is not None and d.shape != shape:
        raise ArtifactError(
            f"{where}: shape {list(shape)} required, as in the dense checkpoint, got {_short(d.shape)}"
        )
    if d.dtype not in _DTYPES:
        raise ArtifactError(f"{where}: dtype {d.dtype!r} is none of {', '.join(_DTYPES)}")
    if any(size < 0 for size in d.shape) or d.numel >= 2**63:
        raise ArtifactError(f"{where}: shape {_short(d.shape)} is out of range")
    if d.count > d.numel:
        raise ArtifactError(f"{where}: {d.count} coordinates do not fit shape {list(d.shape)}")
    least, most = (0, 0) if d.implied else (d.count, d.most_gaps)
    if not least <= d.gaps <= most:
        raise ArtifactError(
            f"{where}: gaps of {least} to {most} bytes required for {d.count} coordinates of shape "
            f"{list(d.shape)}, got {d.gaps}"
        )
    planes = len(d.sizes) - len(d.heads)
    coded = d.numel if d.implied else d.count
    if min(d.sizes, default=0) < 0 or not min(coded, 1) <= planes <= min(coded, 1) * d.code_bytes:
        raise ArtifactError(f"{where}: sizes {_short(d.sizes)} are not those of its streams")
    if (d.relative and d.values != "exact") or (
        d.implied and d.values == "exact" and not d.relative
    ):
        raise ArtifactError(f"{where}: {d.values} values are never stored so")
    if d.factors:
        _check_factors(d, d.factors, where)
    return d


def _check_factors(d: Description, factors: FactorsDescription, where: str) -> None:
    if factors.dtype not in _FACTOR_DTYPES:
        raise ArtifactError(f"{where}: factors of dtype {factors.dtype!r}")
    if (d.values == "exact" and d.count) or not d.shape or d.numel == 0:
        raise ArtifactError(f"{where}: {d.values} values of shape {list(d.shape)} take no factors")
    if factors.rank > min(
        d.shape[-1], d.numel // d.shape[-1]
    ):  # at most two numbers for each weight
        raise ArtifactError(f"{where}: rank {factors.rank} does not fit shape {list(d.shape)}")
    if factors.paired > (factors.rank if factors.dtype == "int8" else 0):
        raise ArtifactError(f"{where}: {factors.paired} of its factors cannot be paired")
    planes = _FACTOR_DTYPES[factors.dtype] + (1 if factors.paired else 0)
    if len(factors.sizes) != planes + 1 or min(factors.sizes) < 0:
        raise ArtifactError(f"{where}: sizes {_short(factors.sizes)} are not those of factors")


def _short(numbers: tuple[int, ...]) -> str:
    """A list that stays readable, whatever a file holds."""
    return reprlib.repr(list(numbers))
