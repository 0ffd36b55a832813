"""The description of each stored weight in an expert file, and its checks; docs/format.md has the fields.

All checks pass before any byte of the weight is read. No torch is imported.
"""

import math
import reprlib
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergekit_mediator.delta.value_forms import Form
from mergekit_mediator.errors import ArtifactError

# The bytes of a number, by the name of its dtype in torch.
_DTYPES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_FACTOR_DTYPES = {"int8": 1, **_DTYPES}
# Below this density the low byte of a gap is almost random, and goes to a stream of its own.
_WIDE_GAPS_DENSITY = 1 / 256


class FactorsDescription(BaseModel):
    """The low-rank part of a stored weight.

    Attributes:
        rank: the number of components.
        dtype: of the factors, by its name in torch.
        paired: the number of trailing columns whose codes are stored two a byte.
        sizes: the bytes of each stored stream.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(gt=0)
    dtype: str
    paired: int = Field(default=0, ge=0)
    sizes: tuple[int, ...]


class Description(BaseModel):
    """One stored weight.

    Attributes:
        shape: of the weight, as in the checkpoint.
        dtype: of the weight, by its name in torch.
        values: the form of the codes.
        count: the number of stored coordinates.
        scale: of the codes; see `StoredWeight`.
        shift: of the codes; see `StoredWeight`.
        share: of the expert in the dense weight; see `StoredWeight`.
        relative: whether exact values are differences from the dense weight.
        implied: whether all coordinates have a code, so that no positions are stored.
        gaps: the decoded size of the first stream of positions, in bytes.
        sizes: the bytes of each stored stream, without those of the factors.
        factors: the low-rank part, if there is one.
        check: the CRC-32 of the decoded codes and factors.
    """

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
        """The number of coordinates of the weight."""
        return math.prod(self.shape)

    @property
    def wide(self) -> bool:
        """Whether the low bytes of the gaps have a stream of their own."""
        return self.count < _WIDE_GAPS_DENSITY * self.numel

    @property
    def code_bytes(self) -> int:
        """The bytes of one code in memory."""
        if self.values == "exact":
            return _DTYPES[self.dtype]
        return 2 if self.values in ("steps", "random_sign") else 1

    @property
    def plane_bytes(self) -> int:
        """The decoded size, in bytes, of each stream of codes."""
        if self.values == "random_sign":
            return -(-self.count // 8)
        return self.numel if self.implied else self.count

    @property
    def most_planes(self) -> int:
        """The largest possible number of streams of codes."""
        if not self.plane_bytes:
            return 0
        return 2 if self.values == "random_sign" else self.code_bytes

    @property
    def heads(self) -> tuple[int, ...]:
        """The decoded sizes, in bytes, of the streams of positions, or of the levels of rows; codes follow them."""
        if self.implied:
            return ()
        if self.values == "random_sign":
            return (self.numel // max(1, self.shape[-1]),) if self.count else ()
        return (self.gaps, self.count) if self.wide else (self.gaps,)

    @property
    def most_gaps(self) -> int:
        """The largest possible decoded size of the first stream, in bytes.

        It has one byte for each stored coordinate, and one more for each run of 255 coordinates between
        them. With wide gaps a run is 255 · 256 coordinates long.
        """
        return self.count + (self.numel - self.count) // (255 * (256 if self.wide else 1))

    @property
    def factor_numbers(self) -> int:
        """The number of numbers in the two factors, without the scales."""
        if self.factors is None:
            return 0
        return self.factors.rank * (self.numel // max(1, self.shape[-1]) + self.shape[-1])


def parse_description(fields: Any, where: str, shape: tuple[int, ...] | None = None) -> Description:
    """Check a description from a file, so that its shape bounds the memory that decoding takes.

    Args:
        fields: the description as JSON has it.
        where: the file and tensor, for error messages.
        shape: of the weight in the dense checkpoint, which the description must have; None to take the
            description's own shape.

    Raises:
        ArtifactError: a field is missing, unknown or out of range, or the shape differs.
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
        raise ArtifactError(f"{where}: dtype of {', '.join(_DTYPES)} required, got {d.dtype!r}")
    if any(size < 0 for size in d.shape) or d.numel >= 2**63:
        raise ArtifactError(f"{where}: shape {_short(d.shape)} is out of range")
    if d.count > d.numel:
        raise ArtifactError(f"{where}: {d.count} coordinates do not fit shape {list(d.shape)}")
    without = d.implied or d.values == "random_sign"
    least, most = (0, 0) if without else (d.count, d.most_gaps)
    if not least <= d.gaps <= most:
        raise ArtifactError(
            f"{where}: gaps of {least} to {most} bytes required for {d.count} coordinates of shape "
            f"{list(d.shape)}, got {d.gaps}"
        )
    planes = len(d.sizes) - len(d.heads)
    if min(d.sizes, default=0) < 0 or not min(d.plane_bytes, 1) <= planes <= d.most_planes:
        raise ArtifactError(f"{where}: sizes {_short(d.sizes)} do not fit its streams")
    if (d.relative and d.values != "exact") or (
        d.implied and (d.values == "random_sign" or (d.values == "exact" and not d.relative))
    ):
        raise ArtifactError(
            f"{where}: {d.values} values cannot have relative {d.relative} and implied {d.implied}"
        )
    if d.factors:
        _check_factors(d, d.factors, where)
    return d


def _check_factors(d: Description, factors: FactorsDescription, where: str) -> None:
    if factors.dtype not in _FACTOR_DTYPES:
        raise ArtifactError(
            f"{where}: factors: dtype of {', '.join(_FACTOR_DTYPES)} required, got {factors.dtype!r}"
        )
    if (d.values == "exact" and d.count) or not d.shape or d.numel == 0:
        raise ArtifactError(
            f"{where}: {d.values} values of shape {list(d.shape)} cannot have factors"
        )
    # The limit allows at most two numbers for each weight.
    if factors.rank > min(d.shape[-1], d.numel // d.shape[-1]):
        raise ArtifactError(f"{where}: rank {factors.rank} does not fit shape {list(d.shape)}")
    if factors.paired > (factors.rank if factors.dtype == "int8" else 0):
        raise ArtifactError(
            f"{where}: {factors.paired} columns of {factors.dtype} factors of rank {factors.rank} "
            "cannot be paired"
        )
    planes = _FACTOR_DTYPES[factors.dtype] + (1 if factors.paired else 0)
    if len(factors.sizes) != planes + 1 or min(factors.sizes) < 0:
        raise ArtifactError(f"{where}: sizes {_short(factors.sizes)} do not fit its factors")


def _short(numbers: tuple[int, ...]) -> str:
    """A list of numbers, cut to a readable length."""
    return reprlib.repr(list(numbers))
