"""From bits per parameter to the slope at which all weights of an expert are approximated.

A first pass adds up, weight by weight, what each slope of a fixed grid would cost; the slope that meets
the budget is read off the sum. Nothing is encoded twice.
"""

import math

import numpy as np
import torch
from torch import Tensor

from mergekit_mediator.approximate import as_matrix, is_vector, quantise_steps, remainder_step
from mergekit_mediator.errors import ConfigError
from mergekit_mediator.factors import Components, decompose

# Half octaves: squared errors of weights from 1 down to below what float32 resolves.
SLOPES: tuple[float, ...] = tuple(2.0 ** (-k / 2) for k in range(120))
_FACTOR_BITS = 2.32
_SCALE_BITS = 32
# What Huffman codes of single bytes take more than the entropy of the steps.
_CODING_LOSS = 1.1
_VECTOR_BITS = 6.5
_SAMPLE = 1 << 16  # weights of the remainder
_FINE = 1000


def cost(difference: Tensor, components: Components | None = None) -> Tensor:
    """The bits `[len(SLOPES)]` that a float32 difference of any shape would take at each slope, about.

    Rank is counted exactly, the remainder by the entropy of its steps in a sample of the rows.
    `components` are those of the difference as a matrix, where they are known.
    """
    if is_vector(difference):
        return torch.full((len(SLOPES),), _VECTOR_BITS * difference.numel(), dtype=torch.float64)
    matrix = as_matrix(difference)
    components = components or decompose(matrix)
    sampled = min(len(matrix), max(1, _SAMPLE // matrix.shape[1]))
    rows = torch.linspace(0, len(matrix) - 1, sampled).long()
    left, right = _approximate_factors(components)
    remainder, known = matrix[rows], 0
    bits: list[float] = []
    for slope in SLOPES:
        rank, step = components.rank(slope), remainder_step(slope)
        if rank > known:
            remainder = remainder - left[rows, known:rank] @ right[:, known:rank].T
            known = rank
        if step * _FINE < float(remainder.abs().max()):
            # fine steps: a quarter of a bit more for each half octave of the slope
            bits.append(bits[-1] + matrix.numel() / 4)
        else:
            entropy = _entropy(quantise_steps(remainder, step))
            bits.append(_factor_bits(components, rank) + _CODING_LOSS * entropy * matrix.numel())
    return torch.tensor(bits, dtype=torch.float64)


def _approximate_factors(components: Components) -> tuple[Tensor, Tensor]:
    """All components in coarse steps, each scaled as is best for it alone."""
    left, right = (codes.to(torch.float32) for codes in components.codes())
    left, right = left / left.norm(dim=0), right / right.norm(dim=0)
    found = (left * components.left).sum(0) * (right * components.right).sum(0)
    return left * (components.values * found), right


def slope_for(costs: Tensor, numel: int, bits: float) -> float:
    """The slope at which weights of `numel` parameters with these summed costs take `bits` per parameter.

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


def _factor_bits(components: Components, rank: int) -> float:
    length = components.left.shape[0] + components.right.shape[0]
    return rank * (length * _FACTOR_BITS + _SCALE_BITS)


def _entropy(codes: Tensor) -> float:
    """Bits per code."""
    if not bool(codes.any()):
        return 0.0
    counts = np.bincount(codes.numpy().reshape(-1) - int(codes.min()))
    p = counts[counts > 0] / codes.numel()
    return -math.fsum(share * math.log2(share) for share in p.tolist())
