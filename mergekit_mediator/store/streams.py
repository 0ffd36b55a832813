"""Integers as bytes near their entropy, and back: gaps, byte planes, zstandard; docs/format.md has the layout.

zstandard codes bytes by Huffman here. That is within 1.3% of the entropy of random positions at densities from
1% to 20%, and needs neither a model nor code of our own in the inner loop.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from mergekit_mediator.errors import ArtifactError

Bytes = NDArray[np.uint8]
Integers = NDArray[np.signedinteger[Any]]

# A stream may expand to at most so many times its stored size, so that a small file cannot ask for much memory.
# The writer pads shorter frames with zeros.
_MAX_EXPANSION = 4096
_ALWAYS_ALLOWED = 1 << 20
_ESCAPE = 255
# The search for matches is minimal: the streams have no repetitions, only unequal frequencies.
_PARAMETERS = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    window_log=17,
    hash_log=6,
    chain_log=6,
    search_log=1,
    min_match=7,
    target_length=0,
)


def pack(raw: Bytes, ends: Sequence[int] = ()) -> bytes:
    """Compress bytes to a stored stream: a zstandard frame, or the bytes themselves if they are shorter.

    Args:
        raw: `[n]` uint8.
        ends: places at which the frequencies of bytes change. A block of the frame, which has a Huffman code
            of its own, ends there.
    """
    content = np.ascontiguousarray(raw)
    compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
    stream, parts = compressor.compressobj(size=content.size), []
    for start, end in pairwise([0, *ends]):
        parts += [stream.compress(content[start:end].data)]
        parts += [stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    parts += [stream.compress(content[ends[-1] if ends else 0 :].data), stream.flush()]
    frame = b"".join(parts)
    if content.size > _ALWAYS_ALLOWED:
        frame = frame.ljust(-(-content.size // _MAX_EXPANSION), b"\0")
    return frame if len(frame) < content.size else content.tobytes()


def unpack(stored: Bytes, size: int, where: str) -> Bytes:
    """Decompress a stored stream; the inverse of `pack`.

    Args:
        stored: `[n]` uint8.
        size: the number of bytes that it must hold.
        where: the file and tensor, for error messages.

    Raises:
        ArtifactError: the stream does not hold `size` bytes, or claims to expand too far.
    """
    if stored.size == size:
        return stored
    if size > max(_ALWAYS_ALLOWED, _MAX_EXPANSION * stored.size):
        raise ArtifactError(f"{where}: {stored.size} bytes cannot hold {size}")
    try:
        if zstandard.frame_content_size(stored.data) != size:
            raise ArtifactError(f"{where}: a stream of {size} bytes required")
        content = zstandard.ZstdDecompressor().decompress(
            stored.data, max_output_size=size, allow_extra_data=True
        )
    except zstandard.ZstdError as error:
        raise ArtifactError(f"{where}: a stream cannot be decompressed: {error}") from error
    if len(content) != size:
        raise ArtifactError(f"{where}: {size} bytes required in a stream, got {len(content)}")
    return np.frombuffer(content, dtype=np.uint8)


def gap_streams(positions: Integers, wide: bool) -> list[Bytes]:
    """Encode ascending positions as the gaps between them, one byte each; 255 adds 255, and the gap goes on.

    Args:
        positions: `[k]`, at least 0, ascending.
        wide: whether the low byte of each gap goes to a second stream `[k]`, and the rest to the first. Gaps of
            hundreds have an almost random low byte.

    Returns:
        One stream, or two if `wide`.
    """
    gaps = positions.copy()
    gaps[1:] -= positions[:-1] + 1
    streams = []
    if wide:
        streams = [gaps.astype(np.uint8)]  # the low byte
        gaps >>= 8
    large = np.flatnonzero(gaps >= _ESCAPE)
    escapes = np.repeat(large, gaps[large] // _ESCAPE)
    gaps[large] %= _ESCAPE
    first = gaps.astype(np.uint8)
    return [np.insert(first, escapes, _ESCAPE) if escapes.size else first, *streams]


def from_gap_streams(streams: list[Bytes], numel: int, where: str) -> NDArray[np.int64]:
    """Decode positions `[k]` int64; the inverse of `gap_streams`.

    Args:
        streams: one, or two of wide gaps.
        numel: the number of coordinates.
        where: the file and tensor, for error messages.

    Raises:
        ArtifactError: the positions do not ascend from 0 to below `numel`.
    """
    first, *low = streams
    ends = first != _ESCAPE
    positions = np.cumsum(first + ends.view(np.uint8), dtype=np.int64)
    positions -= 1
    if not ends.all():
        positions = positions[ends]
    if low:
        gaps = np.diff(positions, prepend=-1) - 1
        if gaps.size != low[0].size or (gaps >= (numel >> 8) + 1).any():
            raise ArtifactError(f"{where}: the gaps between positions do not fit {numel}")
        positions = np.cumsum((gaps << 8) + low[0] + 1) - 1
    if positions.size and (positions[-1] >= numel or (low and (np.diff(positions) <= 0).any())):
        raise ArtifactError(f"{where}: positions must ascend from 0 to below {numel}")
    return positions


def byte_planes(codes: Integers, all_planes: bool = False) -> list[Bytes]:
    """Encode signed integers as zigzag codes (0, -1, 1, -2 as 0, 1, 2, 3) in planes of bytes.

    Args:
        codes: `[k]`.
        all_planes: whether planes of zeros are kept.

    Returns:
        A plane `[k]` for each byte in use, the lowest first; at least one if k > 0.
    """
    bits = 8 * codes.itemsize
    zigzag = ((codes << 1) ^ (codes >> (bits - 1))).view(f"u{codes.itemsize}")
    width = max(1, (int(zigzag.max()).bit_length() + 7) // 8) if zigzag.size else 0
    width = codes.itemsize if all_planes else width
    return [(zigzag >> (8 * byte)).astype(np.uint8) for byte in range(width)]


def sign_bits(codes: Integers) -> list[Bytes]:
    """Encode the signs of codes as bits, eight a byte: if any is 0, which are not, and which of these are above 0.

    Args:
        codes: `[k]`.

    Returns:
        One stream of ⌈k / 8⌉ bytes or two, none if k is 0.
    """
    changed = codes != 0
    masks = [*([] if changed.all() else [changed]), codes[changed] > 0]
    return [np.packbits(mask) for mask in masks] if codes.size else []


def from_sign_bits(stored: list[Bytes], count: int, where: str) -> NDArray[np.int16]:
    """Decode signs `[count]`, −1, 0 and 1, from stored streams; the inverse of `sign_bits`.

    Raises:
        ArtifactError: the streams have other sizes.
    """
    signs = np.ones(count, dtype=np.int16)
    if not count:
        return signs
    *mask, positive = stored
    if mask:
        signs[:] = np.unpackbits(unpack(mask[0], -(-count // 8), where), count=count)
    changed = signs.nonzero()[0]
    bits = np.unpackbits(unpack(positive, -(-changed.size // 8), where), count=changed.size)
    signs[changed] = 2 * bits.view(np.int8) - 1
    return signs


def from_byte_planes(planes: list[Bytes], itemsize: int) -> Integers:
    """Decode signed integers `[k]`; the inverse of `byte_planes`.

    Args:
        planes: `[k]` each, the lowest byte first.
        itemsize: the bytes of an integer.
    """
    unsigned = np.zeros(planes[0].size if planes else 0, dtype=f"u{itemsize}")
    for byte, plane in enumerate(planes):
        unsigned |= plane.astype(unsigned.dtype) << unsigned.dtype.type(8 * byte)
    signed = unsigned.view(f"i{itemsize}")
    codes: Integers = (unsigned >> 1).view(signed.dtype) ^ -(signed & 1)
    return codes
