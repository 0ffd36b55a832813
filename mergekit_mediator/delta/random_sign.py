"""A weight's difference as signs drawn at random: unbiased in every number, at the price of noise.

What a fine-tune learned is spread over many small changes. A form that leaves the small ones out shrinks all of it. Here
numbers are drawn at a share of the coordinates and made larger to stand for the others, as DARE does (Yu et al., arXiv
2311.03099). Each is 0 or a sign times the magnitude of its row, with the probabilities whose mean is the number itself.
The coordinates follow from their number, so that they take no bits. Components so large that they would make most of
the noise are stored as factors.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergekit_mediator.delta.approximate import as_matrix, is_vector
from mergekit_mediator.delta.chunks import float_on
from mergekit_mediator.delta.decomposition import decompose
from mergekit_mediator.delta.factor_steps import BITS
from mergekit_mediator.delta.factors import Components, Factors, squared_norm
from mergekit_mediator.delta.kth_largest import count_kept
from mergekit_mediator.delta.sparse import encode
from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.errors import InputError

# Of normal numbers the second is 2.6 of their deviation, so that the first counts.
_CLIP, _CLIP_WEIGHTED = 3.0, 1.5
_TINY = 1e-37
# The magnitude of a row is a code of 16 bits, by one of so many levels.
_LARGEST_LEVEL, _LEVELS_PER_OCTAVE, _LARGEST_CODE = 239, 16, 32767
# `[240]` int64, ascending: 0, and whole numbers up to the largest code. Python rounds alike on all machines.
MAGNITUDES = torch.tensor(
    [
        0,
        *(
            round(_LARGEST_CODE * 2.0 ** ((level - _LARGEST_LEVEL) / _LEVELS_PER_OCTAVE))
            for level in range(1, _LARGEST_LEVEL + 1)
        ),
    ]
)
_AT_ONCE = 1 << 17  # coordinates, few enough for the cache
_HALF, _LONGEST = np.uint64(32), 2**32 - 1
# The constants of splitmix64 (Steele, Lea and Flood, 2014).
_GOLDEN, _FIRST, _SECOND = (
    np.uint64(number) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
# With fewer changed coordinates than this part of those that are kept, exact values take no more bits than signs.
FEW = 1 / 16
# A change has few components that are worth their bits; their vectors take about four bits a number.
MOST_COMPONENTS, FINENESS = 8, 6


def random_positions(numel: int, count: int) -> Tensor:
    """Choose one coordinate of each of `count` runs of equal length, about.

    Args:
        numel: the number of coordinates.
        count: of them, from 0 to `numel`.

    Returns:
        `[count]`, int32 if they fit, ascending. Equal arguments give equal coordinates, everywhere.
    """
    positions = np.empty(count, dtype=np.int32 if numel < 2**31 else np.int64)
    for start in range(0, count, _AT_ONCE):
        run = np.arange(start, min(start + _AT_ONCE, count) + 1, dtype=np.int64)
        # numel · k / count, whose product might not fit 64 bits
        begins = run * (numel // count) + run * (numel % count) // count
        # of 32 random bits the part that is in the run: far faster than a division
        lengths = np.minimum(np.diff(begins), _LONGEST).view(np.uint64)
        chosen = ((_mixed(run[:-1].view(np.uint64)) >> _HALF) * lengths) >> _HALF
        positions[start : start + len(chosen)] = begins[:-1] + chosen.view(np.int64)
    return torch.from_numpy(positions)


def _mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Numbers that look random, one for each."""
    mixed = (numbers + np.uint64(1)) * _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _FIRST
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _SECOND
    found: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return found


def encode_random_sign(
    expert: Tensor, dense: Tensor, density: float, device: str = "cpu"
) -> StoredWeight:
    """Store an expert's difference from the dense expert as signs at random coordinates, and its few largest components.

    The signs' mean is what the components leave, but for numbers of more than three times their row's size. Vectors are
    kept whole, and so are changes of so few coordinates that this takes no more bits.

    Args:
        expert: any shape, in the dtype of the dense expert.
        dense: the dense expert's weight, as the checkpoint will hold it.
        density: fraction in (0, 1] of the coordinates to store.
        device: the device that computes; both weights are copied to it.

    Raises:
        InputError: a weight is not finite.
    """
    if is_vector(expert):
        return encode(expert, dense, 1.0, "exact", device)
    delta = as_matrix(float_on(device, expert) - float_on(device, dense))
    energy = squared_norm(delta)
    if not math.isfinite(energy):
        raise InputError(
            "random_sign values require finite weights: set `values: exact`, which stores all weights"
        )
    count, changed = count_kept(delta.numel(), density), int(delta.count_nonzero())
    if changed <= FEW * count:
        return encode(expert, dense, 1.0, "exact", device)
    factors = largest_components(delta, count / delta.numel())
    if factors is not None:
        delta -= factors.product()
    positions = random_positions(delta.numel(), count)
    index = positions.to(device)
    levels, unit = row_levels(delta)
    sizes = MAGNITUDES.to(device)[levels.to(torch.int64)][index // delta.shape[1]]
    chosen = delta.reshape(-1)[index]
    is_stored = chosen.abs() > _uniform(positions).to(device) * (unit * sizes)
    return StoredWeight(
        tuple(expert.shape),
        dense.dtype,
        "random_sign",
        positions,
        (chosen.sign() * sizes * is_stored).to(torch.int16).cpu(),
        unit * delta.numel() / count,
        factors=factors and factors.to(torch.device("cpu")),
    )


def _uniform(positions: Tensor) -> Tensor:
    """Numbers in [0, 1), float32, that look random and follow from coordinates."""
    mixed = _mixed(~positions.numpy().astype(np.uint64))  # other ones than those of places
    return torch.from_numpy((mixed >> np.uint64(40)).astype(np.float32) / np.float32(2**24))


def row_levels(matrix: Tensor) -> tuple[Tensor, float]:
    """Choose the magnitude of each row: three times the root mean square of its numbers, or the largest if it is smaller.

    Few numbers are larger, and they become as large. A smaller magnitude means less noise. Where few numbers have most of the
    square, as where most did not change, it is 1.5 times the root mean square weighted by the squares.

    Args:
        matrix: `[out, in]` float32.

    Returns:
        Levels `[out]` uint8, and the unit of `MAGNITUDES`.
    """
    largest = torch.maximum(matrix.amax(1), -matrix.amin(1))
    squares = matrix.square()
    energy = squares.sum(1)
    rms = (energy / matrix.shape[1]).sqrt()
    weighted = (squares.square_().sum(1) / energy.clamp(min=_TINY)).sqrt()
    sizes = torch.minimum(largest, torch.maximum(_CLIP * rms, _CLIP_WEIGHTED * weighted))
    unit = float(sizes.max()) / _LARGEST_CODE
    table = MAGNITUDES.to(sizes) * (unit or 1.0)
    # the next magnitude that is not smaller, so that no probability is above 1 but for clipped numbers
    levels = torch.searchsorted(table, sizes * (1 - 1e-6)).clamp(max=_LARGEST_LEVEL)
    return levels.to(torch.uint8), unit


def levels_of(positions: Tensor, codes: Tensor, rows: int, width: int) -> Tensor:
    """Find the levels `[rows]` uint8 of codes `[k]` at positions `[k]` of a matrix `[rows, width]`."""
    largest = torch.zeros(rows, dtype=torch.int64)
    of_row = positions.to(torch.int64) // width
    largest.scatter_reduce_(0, of_row, codes.to(torch.int64).abs(), "amax")
    return torch.searchsorted(MAGNITUDES, largest).to(torch.uint8)


def largest_components(matrix: Tensor, share: float) -> Factors | None:
    """Quantise the components that are worth more than the signs that their bits would be.

    The noise of signs at a share p of N coordinates is ‖R‖² ρ / p, with ρ about 2. A component of squared norm σ² that
    takes b bits reduces it by σ² ρ / p, and b more signs by ‖R‖² ρ b / (p² N). So it is stored if σ² ≥ ‖R‖² b / (p N).

    Args:
        matrix: `[out, in]` float32.
        share: p, of the coordinates that have a sign.

    Returns:
        The factors, or None if no component is worth its bits.
    """
    components = decompose(matrix, most=MOST_COMPONENTS)
    rank = int(worth_storing(components, sum(matrix.shape), torch.tensor([share * matrix.numel()])))
    return components.rounded(torch.full((rank,), FINENESS), matrix)


def worth_storing(components: Components, length: int, counts: Tensor) -> Tensor:
    """Count the components that are worth more than the signs that their bits would be, see `largest_components`.

    Args:
        components: the leading ones of a matrix `[out, in]`.
        length: out + in.
        counts: `[n]`, of signs.

    Returns:
        `[n]` int64, one for each number of signs.
    """
    squares = components.squares
    left_over = (components.energy - squares.cumsum(0)).clamp(min=0)
    least = left_over * float(BITS[FINENESS]) * length
    return (squares * counts[:, None] >= least).to(torch.int64).cumprod(1).sum(1)
