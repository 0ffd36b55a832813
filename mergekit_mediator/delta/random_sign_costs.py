"""The bits and the noise of a difference that is stored as signs at random coordinates, at each slope.

A number v of a row of magnitude m is stored as m / p with the probability p v / m, for a density p: its mean is v, and its
variance v m / p − v². So another bit saves most noise where numbers are large, and the density of a weight is proportional
to their root mean square.
"""

import torch
from torch import Tensor

from mergekit_mediator.delta.approximate import as_matrix, is_vector
from mergekit_mediator.delta.decomposition import decompose
from mergekit_mediator.delta.factor_steps import BITS, KEPT
from mergekit_mediator.delta.factors import squared_norm
from mergekit_mediator.delta.kth_largest import count_kept
from mergekit_mediator.delta.random_sign import (
    FEW,
    FINENESS,
    MAGNITUDES,
    MOST_COMPONENTS,
    row_levels,
    worth_storing,
)
from mergekit_mediator.delta.tradeoff import SLOPES

# The noise at density p is about so many squared norms over p.
_NOISE = 2.0
# Signs over their entropy, the bits of one part of a weight, and those of a row's level and of an exact number.
# tests/delta/test_random_sign_costs.py holds them to what is stored.
_CODING_LOSS, _CODES_BITS, _LEVEL_BITS, _EXACT_BITS = 1.01, 400, 6, 10


def density_at(difference: Tensor, slope: float) -> float:
    """Choose the density in (0, 1] at which another stored bit saves about `slope` of squared error.

    Args:
        difference: of an expert from its reference, float32, any shape.
        slope: squared error per stored number, > 0.
    """
    numel = max(1, difference.numel())
    return float(_densities(squared_norm(difference) / numel, torch.tensor([slope]).double()))


def random_sign_tradeoff(difference: Tensor, reference_square: float) -> Tensor:
    """Predict the bits and the squared error of a difference at each slope, as `tradeoff.tradeoff` does.

    Most of the squared error is noise, and several times the squared norm of the difference.

    Args:
        difference: of an expert from its reference, float32, any shape.
        reference_square: the squared norm of the base's weight.

    Returns:
        `[4, len(SLOPES)]` float64: bits, squared error, and in every column the squared norm of the difference and
        `reference_square`.
    """
    slopes = torch.tensor(SLOPES, dtype=torch.float64)
    numel, energy = difference.numel(), squared_norm(difference)
    bits, error = torch.zeros_like(slopes), torch.zeros_like(slopes)
    changed = int(difference.count_nonzero())
    exact_bits = changed * _EXACT_BITS + numel * float(
        _entropy(torch.tensor(changed / (numel or 1)).double())
    )
    if is_vector(difference):
        bits += exact_bits
    elif changed:
        matrix = as_matrix(difference)
        counts = torch.tensor(
            [count_kept(numel, p) for p in _densities(energy / numel, slopes).tolist()]
        ).double()
        bits, error = _signs(matrix, energy, counts)
        exact = counts * FEW >= changed
        bits = torch.where(exact, exact_bits, bits)
        error = torch.where(exact, 0.0, error)
    return torch.stack(
        [bits, error, *(torch.full_like(slopes, n) for n in (energy, reference_square))]
    )


def _densities(mean_square: float, slopes: Tensor) -> Tensor:
    """The density at each slope, `[n]` float64, in (0, 1]."""
    return (mean_square * _NOISE / slopes).sqrt().clamp(min=1e-12, max=1.0)


def _signs(matrix: Tensor, energy: float, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The bits and the squared error of signs and components, for numbers of signs `[n]`."""
    (rows, width), numel = matrix.shape, matrix.numel()
    components = decompose(matrix, most=MOST_COMPONENTS)
    ranks = worth_storing(components, rows + width, counts)
    parts = torch.cat([torch.zeros(1).double(), components.squares.cumsum(0)]) / energy
    kept = parts[ranks]
    # numbers are spread more evenly without the components
    remainder = matrix - (components.left * components.values) @ components.right.T
    (noise, share), (last_noise, last_share) = _drawn(matrix), _drawn(remainder)
    removed = kept / max(float(parts[-1]), 1e-30)
    noises = noise + (last_noise - noise) * removed
    shares = share + (last_share - share) * removed
    error = (1 - kept) * (noises * numel / counts - 1) + kept * (1 - float(KEPT[FINENESS]))
    bits = _CODING_LOSS * counts * (_entropy(shares) + shares) + _CODES_BITS + _LEVEL_BITS * rows
    bits += ranks * float(BITS[FINENESS]) * (rows + width)
    return bits, error.clamp(min=0) * energy


def _drawn(matrix: Tensor) -> tuple[float, float]:
    """The noise at density 1 over the squared norm, plus 1; and the mean probability that a number is stored."""
    levels, unit = row_levels(matrix)
    magnitudes = unit * MAGNITUDES.to(matrix)[levels.to(torch.int64)]
    sums = torch.linalg.vector_norm(matrix, 1, dim=1)
    noise = float((magnitudes * sums).sum(dtype=torch.float64))
    share = float((sums / magnitudes.clamp(min=1e-30)).sum(dtype=torch.float64))
    return noise / max(squared_norm(matrix), 1e-30), share / matrix.numel()


def _entropy(share: Tensor) -> Tensor:
    share = share.clamp(1e-9, 1 - 1e-9)
    return -share * share.log2() - (1 - share) * (1 - share).log2()
