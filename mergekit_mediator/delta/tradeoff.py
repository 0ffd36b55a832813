"""From bits per parameter to the slope at which all weights of an expert are approximated.

A first pass adds up, weight by weight, what each slope of a fixed grid would cost and leave; the slope that
meets the budget is read off the sum. Nothing is encoded twice.
"""

import math

import numpy as np
import torch
from torch import Tensor

from mergekit_mediator.delta.approximate import (
    as_matrix,
    is_dropped,
    is_vector,
    quantise_steps,
    remainder_step,
)
from mergekit_mediator.delta.factor_steps import BITS, KEPT
from mergekit_mediator.delta.factors import Components, decompose
from mergekit_mediator.errors import ConfigError

# Half octaves: squared errors of weights from 1 down to below what float32 resolves.
SLOPES: tuple[float, ...] = tuple(2.0 ** (-k / 2) for k in range(120))
_SCALE_BITS = 32
# What factors take over the entropy of their codes, and any part of a weight over its own: Huffman codes are
# stored too. Measured.
_FACTOR_CODING_LOSS, _CODES_BITS = 1.01, 400
# What is stored over the entropy of the steps, measured: gaps adapt to where the steps are, which makes up
# for half of what Huffman codes lose; with a bit per weight and more there are no gaps.
_CODING_LOSS, _CODING_LOSS_PER_BIT, _MOST_CODING_LOSS = 1.03, 0.07, 1.12
_VECTOR_BITS = 6.5
_SAMPLE = 1 << 16  # weights of the remainder
_FINE = 1000


def tradeoff(
    difference: Tensor, components: Components | None = None, importance: float = 1.0
) -> Tensor:
    """What approximating a float32 difference of any shape takes and leaves, about: `[2, len(SLOPES)]`.

    The first row are bits, the second the squared error that is left, at each slope. Rank is counted
    exactly, the remainder in a sample of the rows, by the entropy of its steps.

    Args:
        difference: of an expert from the base.
        components: those of the difference as a matrix, where they are known.
        importance: what its squared error is weighted by; slopes are of weighted errors.
    """
    numel = difference.numel()
    if is_vector(difference):
        stored = torch.full((len(SLOPES),), _VECTOR_BITS * numel, dtype=torch.float64)
        return torch.stack([stored, torch.zeros_like(stored)])
    matrix = as_matrix(difference)
    components = components or decompose(matrix)
    sampled = min(len(matrix), max(1, _SAMPLE // matrix.shape[1]))
    rows = torch.linspace(0, len(matrix) - 1, sampled).long()
    left, right = components.left[rows] * components.values, components.right
    remainder, known = matrix[rows], 0
    largest = float(remainder.abs().max())
    bits: list[float] = []
    errors: list[float] = []
    for slope in (slope / importance for slope in SLOPES):
        fineness, step = components.fineness(slope), remainder_step(slope)
        rank = fineness.numel()
        if rank > known:
            remainder = remainder - left[:, known:rank] @ right[:, known:rank].T
            known, largest = rank, float(remainder.abs().max())
        # what quantised factors miss comes back in the remainder
        missed = 1 + _missed(components, fineness)
        step /= math.sqrt(missed)
        if step * _FINE < largest:
            # fine steps: a quarter of a bit more for each half octave of the slope
            bits.append(bits[-1] + numel / 4)
            errors.append(missed * step**2 / 12 * numel)
        elif is_dropped(largest, step):
            bits.append(_factor_bits(components, fineness))
            errors.append(missed * _mean_square(remainder) * numel)
        else:
            codes = quantise_steps(remainder, step)
            entropy = _entropy(codes)
            loss = min(_MOST_CODING_LOSS, _CODING_LOSS + _CODING_LOSS_PER_BIT * entropy)
            coded = loss * entropy * numel + (_CODES_BITS if entropy else 0)
            bits.append(_factor_bits(components, fineness) + coded)
            errors.append(missed * _mean_square(remainder - codes * step) * numel)
    return torch.tensor([bits, [importance * e for e in errors]], dtype=torch.float64)


def slope_for(costs: Tensor, numel: int, bits: float) -> float:
    """The slope at which weights of `numel` parameters take `bits` per parameter.

    Args:
        costs: `[len(SLOPES)]`, their summed bits at each slope; see `tradeoff`.
        numel: of all of them.
        bits: that they may take.

    Raises:
        ConfigError: no slope takes so few bits.
    """
    wanted = bits * numel
    above = (costs > wanted).nonzero()
    if not above.numel():
        return SLOPES[-1]
    first = int(above[0])
    if first == 0:
        least = float(costs[0]) / max(1, numel)
        raise ConfigError(f"bits: {bits:g} is less than the least that is possible, {least:.2g}")
    low, high = float(costs[first - 1]), float(costs[first])
    # between two slopes of the grid the logarithms are close to a line
    part = (math.log1p(wanted) - math.log1p(low)) / (math.log1p(high) - math.log1p(low))
    return math.pow(2.0, -(first - 1 + part) / 2)


def _missed(components: Components, fineness: Tensor) -> float:
    """Squared error of quantising the factors over that of leaving out the other components."""
    squares = components.values[: fineness.numel()].double().square()
    remaining = max(components.energy - float(squares.sum()), 1e-9 * components.energy)
    return float((squares * (1 - KEPT[fineness])).sum()) / remaining if remaining else 0.0


def _factor_bits(components: Components, fineness: Tensor) -> float:
    length = components.left.shape[0] + components.right.shape[0]
    if not fineness.numel():
        return 0.0
    codes = _FACTOR_CODING_LOSS * length * float(BITS[fineness].sum())
    return codes + fineness.numel() * _SCALE_BITS + _CODES_BITS


def _mean_square(values: Tensor) -> float:
    return float(values.square().mean(dtype=torch.float64))


def _entropy(codes: Tensor) -> float:
    """Bits per code."""
    if not bool(codes.any()):
        return 0.0
    counts = np.bincount(codes.numpy().reshape(-1) - int(codes.min()))
    p = counts[counts > 0] / codes.numel()
    return -math.fsum(share * math.log2(share) for share in p.tolist())
