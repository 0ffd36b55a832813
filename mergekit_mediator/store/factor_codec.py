"""Factors as streams and back; most codes of a low-rank part fit into half a byte."""

import numpy as np
import torch
from torch import Tensor

from mergekit_mediator.delta.factors import Factors
from mergekit_mediator.delta.float_bits import from_ordered, raw_bytes, to_ordered
from mergekit_mediator.errors import ArtifactError
from mergekit_mediator.store.description import Description, FactorsDescription
from mergekit_mediator.store.streams import Bytes, byte_planes, from_byte_planes, pack, unpack

# A block may end before a column whose mean magnitude is below this part of that of the block's first column.
_FALLS = (0.75, 0.55, 0.35, 0.0)


def encode_factors(factors: Factors) -> tuple[list[bytes], FactorsDescription]:
    """Encode factors as byte planes of the joined columns, and then the scales.

    The trailing int8 columns with all codes in -8 to 7 are stored two codes a byte. A Huffman code of such
    pairs is within 2% of their entropy; one of single codes is 9% above it.

    Returns:
        The streams, and the description of the factors.
    """
    numbers = torch.cat([factors.left, factors.right]).T.contiguous()
    integers = to_ordered(numbers) if numbers.is_floating_point() else numbers
    if integers.dtype == torch.int8:
        paired, streams = _encode_codes(integers)
    else:
        planes = byte_planes(integers.reshape(-1).numpy(), all_planes=True)
        paired, streams = 0, [pack(plane) for plane in planes]
    streams.append(pack(raw_bytes(factors.scales)))
    dtype = str(numbers.dtype).removeprefix("torch.")
    sizes = tuple(len(stream) for stream in streams)
    return streams, FactorsDescription(rank=factors.rank, dtype=dtype, paired=paired, sizes=sizes)


def decode_factors(
    streams: list[Bytes], d: Description, factors: FactorsDescription, where: str
) -> Factors:
    """Decode factors; the inverse of `encode_factors`.

    Args:
        streams: of the factors.
        d: the description of the whole weight.
        factors: the description of its low-rank part.
        where: the file and tensor, for error messages.

    Raises:
        ArtifactError: the streams do not fit the descriptions, or a scale is not finite.
    """
    dtype, rank = getattr(torch, factors.dtype), factors.rank
    length = d.factor_numbers // rank
    joined = factors.paired * length
    planes = [unpack(s, rank * length - joined, where) for s in streams[: dtype.itemsize]]
    if joined:
        pairs = unpack(streams[dtype.itemsize], (joined + 1) // 2, where)
        planes = [np.concatenate([planes[0], _split(pairs)[:joined]])]
    integers = torch.from_numpy(from_byte_planes(planes, dtype.itemsize))
    numbers = from_ordered(integers, dtype) if dtype.is_floating_point else integers
    scales = torch.from_numpy(unpack(streams[-1], 4 * rank, where).copy()).view(torch.float32)
    if not bool(scales.isfinite().all()):
        raise ArtifactError(f"{where}: the scales of its factors must be finite")
    columns, out = numbers.view(rank, -1), d.numel // d.shape[-1]
    return Factors(columns[:, :out].T.contiguous(), columns[:, out:].T.contiguous(), scales)


def _encode_codes(columns: Tensor) -> tuple[int, list[bytes]]:
    """The number of paired columns of `[r, out + in]` int8, and the streams of the single and the paired ones."""
    rank, length = columns.shape
    paired = _trailing_nibbles(columns)
    single = rank - paired
    (plane,) = byte_planes(columns.reshape(-1).numpy(), all_planes=True)
    sizes = columns.abs().to(torch.float32).mean(1).tolist()
    streams = [_shortest(plane[: single * length], sizes[:single], length)]
    if paired:
        pairs = _join(plane[single * length :])
        streams.append(_shortest(pairs, sizes[single:], length / 2))
    return paired, streams


def _shortest(content: Bytes, sizes: list[float], length: float) -> bytes:
    """The shortest stream of columns, in blocks of columns of similar magnitude.

    More similar columns make a better code of each block, but more blocks store more codes.
    """
    ends = {tuple(int(i * length) for i in _falls(sizes, by)) for by in _FALLS}
    return min((pack(content, e) for e in sorted(ends)), key=len)


def _falls(sizes: list[float], by: float) -> list[int]:
    """The columns that begin a block: each is smaller than the first of the block before, by a factor."""
    starts, first = [], sizes[0] if sizes else 0.0
    for i, size in enumerate(sizes):
        if size < by * first:
            starts.append(i)
            first = size
    return starts


def _trailing_nibbles(columns: Tensor) -> int:
    """The number of trailing columns of `[r, out + in]` int8 with all codes in -8 to 7."""
    fits = (columns.amin(1) >= -8) & (columns.amax(1) <= 7)
    return int(fits.flip(0).to(torch.int64).cumprod(0).sum())


def _join(nibbles: Bytes) -> Bytes:
    """Join numbers below 16 `[n]`, two a byte, the first one low: `[ceil(n / 2)]`."""
    even = np.append(nibbles, np.uint8(0)) if nibbles.size % 2 else nibbles
    return even[0::2] | (even[1::2] << np.uint8(4))


def _split(pairs: Bytes) -> Bytes:
    return np.stack([pairs & np.uint8(15), pairs >> np.uint8(4)], axis=1).reshape(-1)
