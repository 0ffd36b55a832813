"""A stored weight as bytes and back; docs/format.md has the layout."""

import math
import zlib

import numpy as np
import torch
from torch import Tensor

from mergekit_mediator.delta.factors import Factors
from mergekit_mediator.delta.float_bits import by_exponent, from_ordered, raw_bytes, to_ordered
from mergekit_mediator.delta.random_sign import MAGNITUDES, levels_of, random_positions
from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.errors import ArtifactError
from mergekit_mediator.store.description import Description
from mergekit_mediator.store.factor_codec import decode_factors, encode_factors
from mergekit_mediator.store.streams import (
    Bytes,
    Integers,
    byte_planes,
    from_byte_planes,
    from_gap_streams,
    from_sign_bits,
    gap_streams,
    pack,
    sign_bits,
    unpack,
)

# From this density on, codes of all coordinates are shorter than gaps and codes of the stored ones.
_IMPLIED_DENSITY = 0.45


def encode_bytes(sparse: StoredWeight, dense: Tensor | None = None) -> tuple[Tensor, Description]:
    """Encode a stored weight.

    Args:
        sparse: the stored weight, on the CPU.
        dense: the dense expert's weight, of the same shape and dtype. With it, exact values take about
            half the bytes, and decoding them takes the same weight.

    Returns:
        The stream `[bytes]` uint8, and its description.
    """
    positions, numel = sparse.positions, math.prod(sparse.shape)
    exact, relative = sparse.values == "exact", sparse.values == "exact" and dense is not None
    random = sparse.values == "random_sign"  # its positions follow from their number
    d = Description(
        shape=sparse.shape,
        dtype=str(sparse.dtype).removeprefix("torch."),
        values=sparse.values,
        count=positions.numel(),
        scale=sparse.scale,
        shift=sparse.shift,
        share=sparse.share,
        relative=relative,
        implied=(relative or not (exact or random))
        and positions.numel() > _IMPLIED_DENSITY * numel,
        check=_checksum(sparse.codes, sparse.factors),
    )
    codes = to_ordered(sparse.codes) if exact else sparse.codes
    reference = _dense_values(dense, positions) if relative else None
    if reference is not None:
        codes = codes - to_ordered(reference)
    if d.implied:
        codes = codes.new_zeros(numel).index_copy_(0, positions.to(torch.int64), codes)
        reference = _dense_values(dense, None) if relative else None
    array: Integers = codes.numpy()
    if reference is not None:
        array = array[by_exponent(reference)]
    parts = []
    if random and d.heads:
        parts = [levels_of(positions, codes, d.heads[0], sparse.shape[-1]).numpy()]
    elif not d.implied and not random:
        parts = gap_streams(positions.numpy(), d.wide)
    planes = sign_bits(array) if random else byte_planes(array)
    streams = [pack(part) for part in [*parts, *planes]]
    sizes = tuple(len(stream) for stream in streams)
    factors = None
    if sparse.factors:
        factor_streams, factors = encode_factors(sparse.factors)
        streams += factor_streams
    content = np.frombuffer(b"".join(streams), dtype=np.uint8).copy()
    gaps = parts[0].size if parts and not random else 0
    update = {"gaps": gaps, "sizes": sizes, "factors": factors}
    return torch.from_numpy(content), d.model_copy(update=update)


def decode_bytes(
    stream: Tensor, description: Description, where: str, dense: Tensor | None = None
) -> StoredWeight:
    """Decode a stored weight; the inverse of `encode_bytes`.

    Args:
        stream: `[bytes]` uint8.
        description: of the stream; see `parse_description`.
        where: the file and tensor, for error messages.
        dense: the dense expert's weight as in its checkpoint. A `relative` description requires it. Any
            weight must have the described shape.

    Raises:
        ArtifactError: the bytes do not fit the description, or `dense` is another weight than the encoder
            had.
    """
    d, dtype = description, getattr(torch, description.dtype)
    fits = dense is not None and tuple(dense.shape) == d.shape
    same = fits and dense is not None and dense.dtype == dtype
    if not (same if d.relative else fits or dense is None):
        got = "none" if dense is None else f"{dense.dtype} {list(dense.shape)}"
        raise ArtifactError(
            f"{where}: the dense weight {dtype} {list(d.shape)} is required, got {got}"
        )
    sizes = d.sizes + (d.factors.sizes if d.factors else ())
    if sum(sizes) != stream.numel():
        raise ArtifactError(f"{where}: {sum(sizes)} bytes required, got {stream.numel()}")
    streams = _cut(stream.numpy(), sizes)
    factors = decode_factors(streams[len(d.sizes) :], d, d.factors, where) if d.factors else None
    of_codes, array = streams[len(d.heads) : len(d.sizes)], np.zeros(0, dtype=np.int16)
    random = d.values == "random_sign"
    if not random:
        planes = [unpack(s, d.plane_bytes, where) for s in of_codes]
        array = from_byte_planes(planes, d.code_bytes)
    places: Tensor | None = None
    if random:
        places = random_positions(d.numel, d.count)
        if d.heads:
            levels = torch.from_numpy(unpack(streams[0], d.heads[0], where).astype(np.int64))
            of_rows = MAGNITUDES[levels.clamp(max=len(MAGNITUDES) - 1)].to(torch.int16)
            signs = from_sign_bits(of_codes, d.count, where)
            array = signs * of_rows[places.long() // d.shape[-1]].numpy()
    elif not d.implied:
        heads = [unpack(s, n, where) for s, n in zip(streams, d.heads, strict=False)]
        places = torch.from_numpy(from_gap_streams(heads, d.numel, where))
    if d.relative:
        ordered = np.empty_like(array)
        ordered[by_exponent(_dense_values(dense, places))] = array
        array = ordered
    codes = torch.from_numpy(array)
    if places is None:
        places = codes.nonzero().reshape(-1)
        codes = codes[places]
    if places.numel() != d.count:
        raise ArtifactError(f"{where}: {d.count} coordinates required, got {places.numel()}")
    if d.values == "exact":
        codes = codes + to_ordered(_dense_values(dense, places)) if d.relative else codes
        codes = from_ordered(codes, dtype)
    if _checksum(codes, factors) != d.check:
        reason = ": is this the dense weight of the merge?" if d.relative else ""
        raise ArtifactError(f"{where}: the decoded values fail their checksum{reason}")
    positions = places.to(torch.int32 if d.numel < 2**31 else torch.int64)
    return StoredWeight(
        d.shape, dtype, d.values, positions, codes, d.scale, d.shift, factors, d.share
    )


def _dense_values(dense: Tensor | None, positions: Tensor | None) -> Tensor:
    """The dense weights `[k]` at positions `[k]`, or all of them, flat."""
    if dense is None:
        raise TypeError("relative values need the dense weight")
    flat = dense.reshape(-1)
    return flat if positions is None else flat.index_select(0, positions)


def _cut(stream: Bytes, sizes: tuple[int, ...]) -> list[Bytes]:
    ends = np.cumsum(sizes, dtype=np.int64).tolist()
    return [stream[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _checksum(codes: Tensor, factors: Factors | None) -> int:
    """The CRC-32 of the codes, and of the factors row by row if there are any."""
    check = zlib.crc32(raw_bytes(codes).data)
    for part in (factors.left, factors.right, factors.scales) if factors else ():
        check = zlib.crc32(raw_bytes(part).data, check)
    return check
