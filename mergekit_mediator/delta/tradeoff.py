"""From bits per parameter to the slope at which all weights of an expert are approximated.

A first pass predicts, for each weight and each slope of a fixed grid, the bits and the remaining squared error.
The sums over weights tell the slope that meets a budget. No weight is encoded twice.
"""

import math

import torch
from torch import Tensor

from mergekit_mediator.delta.approximate import (
    as_matrix,
    is_dropped,
    is_vector,
    remainder_step,
)
from mergekit_mediator.delta.decomposition import decompose
from mergekit_mediator.delta.factor_steps import BITS, KEPT
from mergekit_mediator.delta.factors import Components
from mergekit_mediator.delta.rounding import Sample
from mergekit_mediator.errors import ConfigError

# Half octaves: squared errors from 1 down to less than float32 resolves.
SLOPES: tuple[float, ...] = tuple(2.0 ** (-k / 2) for k in range(120))
_SCALE_BITS = 32
# The bits of factors over the entropy of their codes, and the bits of the Huffman codes of one part of a weight.
# tests/delta/test_tradeoff.py holds these and the next ones to what is stored.
_FACTOR_CODING_LOSS, _CODES_BITS = 1.01, 400
# The bits of the remainder over the entropy of its steps. Huffman codes lose bits; gaps adapt to clusters of
# steps, which makes up for half of that. From one bit per weight on, the stored form has no gaps.
_CODING_LOSS, _CODING_LOSS_PER_BIT, _MOST_CODING_LOSS = 1.03, 0.07, 1.12
_VECTOR_BITS = 6.5  # a number
_SAMPLE = 1 << 16  # numbers of the remainder that are quantised for the prediction
_FINE = 1000  # steps up to the largest magnitude, from which on a formula predicts


def tradeoff(
    difference: Tensor, components: Components | None = None, reference_square: float = 0.0
) -> Tensor:
    """Predict the bits and the remaining squared error of a difference at each slope.

    The rank is exact. The bits of the remainder are predicted from a sample of the rows, by the entropy of
    their steps.

    Args:
        difference: of an expert from the base, float32, any shape.
        components: of the difference as a matrix; computed if they are None.
        reference_square: the squared norm of the base's weight; only `LossLaw.kept` depends on it.

    Returns:
        `[4, len(SLOPES)]` float64: bits in the first row, squared error in the second, and in every column of the others
        the error of storing nothing and `reference_square`.
    """
    numel = difference.numel()
    base = [reference_square] * len(SLOPES)
    if is_vector(difference):
        stored = [_VECTOR_BITS * numel] * len(SLOPES)
        exact = [0.0] * len(SLOPES)
        return torch.tensor([stored, exact, exact, base], dtype=torch.float64)
    matrix = as_matrix(difference)
    components = components or decompose(matrix)
    slopes = torch.tensor(SLOPES, dtype=torch.float64)
    ranks, fineness = components.finenesses(slopes)
    factor_bits = _factor_bits(components, ranks, fineness)
    lost, remaining = _left(components, ranks, fineness)
    missed = torch.where(remaining > 0, lost / remaining, 0.0)
    sampled = min(len(matrix), max(1, _SAMPLE // matrix.shape[1]))
    rows = torch.linspace(0, len(matrix) - 1, sampled).long()
    # one copy from the device, and none for each slope
    left, right = (components.left[rows] * components.values).cpu(), components.right.cpu()
    remainder, subtracted = matrix[rows].cpu(), 0
    sample = Sample(remainder)
    bits: list[float] = []
    errors: list[float] = []
    of_slopes = (slopes, ranks, factor_bits, 1 + missed, lost + remaining)
    for slope, rank, of_factors, more, left_by_factors in zip(
        *(figures.tolist() for figures in of_slopes), strict=True
    ):
        if components.is_whole(rank):
            bits.append(of_factors)
            errors.append(left_by_factors)
            continue
        if rank > subtracted:
            remainder -= left[:, subtracted:rank] @ right[:, subtracted:rank].T
            subtracted, sample = rank, Sample(remainder)
        # The remainder also holds the error of the quantised factors.
        step = remainder_step(slope) / math.sqrt(more)
        if step * _FINE < sample.largest:
            # Each half octave of the slope takes a quarter of a bit more when steps are fine.
            bits.append(bits[-1] + numel / 4)
            errors.append(more * step**2 / 12 * numel)
        elif is_dropped(sample.largest, step):
            bits.append(of_factors)
            errors.append(more * sample.mean_square * numel)
        else:
            entropy, error = sample.rounded(step)
            loss = min(_MOST_CODING_LOSS, _CODING_LOSS + _CODING_LOSS_PER_BIT * entropy)
            coded = loss * entropy * numel + (_CODES_BITS if entropy else 0)
            bits.append(of_factors + coded)
            errors.append(more * error * numel)
    nothing = errors[:1] * len(errors)
    return torch.tensor([bits, errors, nothing, base], dtype=torch.float64)


def slope_for(costs: Tensor, numel: int, bits: float) -> float:
    """Find the slope at which weights of `numel` parameters take `bits` per parameter.

    Args:
        costs: `[len(SLOPES)]`, the bits of all weights at each slope; see `tradeoff`.
        numel: the parameters of all weights.
        bits: per parameter.

    Raises:
        ConfigError: the weights take more bits at every slope.
    """
    total = bits * numel
    above = (costs > total).nonzero()
    if not above.numel():
        return SLOPES[-1]
    first = int(above[0])
    if first == 0:
        least = float(costs[0]) / max(1, numel)
        raise ConfigError(f"bits: at least {least:.2g} required for these weights, got {bits:g}")
    low, high = float(costs[first - 1]), float(costs[first])
    # Between two slopes of the grid the logarithms are nearly linear.
    part = (math.log1p(total) - math.log1p(low)) / (math.log1p(high) - math.log1p(low))
    return math.pow(2.0, -(first - 1 + part) / 2)


def _left(components: Components, ranks: Tensor, fineness: Tensor) -> tuple[Tensor, Tensor]:
    """The squared errors of quantising the factors and of leaving out the other components, `[n_slopes]` each."""
    squares = _first(ranks, components.squares.expand_as(fineness))
    remaining = (components.energy - squares.sum(1)).clamp(min=1e-9 * components.energy)
    return (squares * (1 - KEPT[fineness])).sum(1), remaining


def _factor_bits(components: Components, ranks: Tensor, fineness: Tensor) -> Tensor:
    """The bits of the factors, `[n_slopes]`."""
    length = components.left.shape[0] + components.right.shape[0]
    codes = _FACTOR_CODING_LOSS * length * _first(ranks, BITS[fineness]).sum(1)
    return torch.where(ranks > 0, codes + ranks * _SCALE_BITS + _CODES_BITS, 0.0)


def _first(ranks: Tensor, numbers: Tensor) -> Tensor:
    """Numbers of components `[n_slopes, k]`, with zeros for all but the first `ranks` `[n_slopes]`."""
    return numbers * (torch.arange(numbers.shape[1]) < ranks[:, None])
