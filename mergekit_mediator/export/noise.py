"""How many directions of a change stand out of the noise of its random signs."""

import torch
from torch import Tensor

from mergekit_mediator.delta.decomposition import decompose
from mergekit_mediator.export.experts import Change
from mergekit_mediator.export.low_rank import LowRank

_ROUNDS = 8  # of the power iteration, for a largest value that is right to a percent
_VECTORS = 8
_MARGIN = 1.05  # the largest values of two draws of noise differ by some percent


def directions_above_noise(change: Change, factors: LowRank) -> int:
    """Count the singular values of a change that are larger than those of its noise alone.

    Signs that are flipped at random keep their noise and lose all else, so that their largest singular value is that of
    noise (Hong, Sheng and Dobriban, Selecting the number of components in PCA via random signflips, 2020).

    Args:
        change: of a matrix, with random signs among its parts.
        factors: of the change, from `low_rank`.
    """
    flipped = _flipped(change)
    flipped = flipped.reshape(-1, flipped.shape[-1])
    noise = decompose(flipped, most=_VECTORS, rounds=_ROUNDS).values
    # each factor holds the root of the singular value
    values = factors.left.square().sum(0)
    return int((values > _MARGIN * noise.max()).sum()) if noise.numel() else len(values)


def _flipped(change: Change) -> Tensor:
    """The sparse part of a change with signs that are flipped at random, in the weight's shape, float32."""
    total = torch.zeros(change.shape).reshape(-1)
    generator = torch.Generator().manual_seed(0)
    for coefficient, part in change.parts:
        if part.values != "random_sign":
            continue
        flips = 2 * torch.randint(0, 2, part.codes.shape, generator=generator) - 1
        difference = part.difference(part.codes) * flips
        total.index_add_(0, part.positions, difference, alpha=coefficient)
    return total.view(change.shape)
