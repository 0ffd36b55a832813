"""The leading components of a matrix, in float32 but for one small product."""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mergekit_mediator.delta.factors import Components, squared_norm
from mergekit_mediator.delta.full_precision import full_precision

# A matrix with more rows and columns than this is decomposed by random projection. The eigenvalues of its Gram
# matrix would take time that grows with the third power of the width.
_LARGEST_GRAM = 1536
_SMALL = 128  # all components of a matrix up to this width are looked at
_ROUNDS = 3  # of the random projection
_SPARE = 8  # vectors more than components, which make the last components good
_LEAST = 1e-5  # of the largest singular value: below it, a component is the rounding of larger ones
_SQUARED = (
    1e-30,
    1e30,
)  # float32 holds the Gram matrix of a matrix whose squared norm is between these


@full_precision()
def decompose(
    matrix: Tensor,
    largest_gram: int = _LARGEST_GRAM,
    most: int | None = None,
    rounds: int = _ROUNDS,
) -> Components:
    """Compute the leading components of a matrix: an eighth of them, and at least 128. A matrix of zeros has none.

    Small matrices are decomposed by the eigenvectors of their Gram matrix, large ones by random projection
    (Halko, Martinsson and Tropp, arXiv 0909.4061). Equal matrices have equal components.

    Args:
        matrix: `[out, in]` float32.
        largest_gram: a matrix with more rows and columns than this is projected.
        most: the number of components, if a few are enough; these take a few products with the matrix.
        rounds: of a random projection; more of them tell values apart that are nearly equal.
    """
    out, width = matrix.shape
    if out < width:
        other = decompose(matrix.T, largest_gram, most, rounds)
        return Components(other.right, other.values, other.left, other.energy)
    energy = squared_norm(matrix)
    if not energy:  # such as a frozen embedding, often the largest matrix of a model
        return Components(
            matrix.new_empty(out, 0), matrix.new_empty(0), matrix.new_empty(width, 0), 0.0
        )
    if not _SQUARED[0] < energy < _SQUARED[1]:
        unit = 2.0 ** round(math.log2(energy) / 2)
        scaled = decompose(matrix / unit, largest_gram, most, rounds)
        return Components(scaled.left, scaled.values * unit, scaled.right, energy)
    count = width if width <= _SMALL else max(_SMALL, width // 8)
    if most is not None:
        right = _projected(matrix, min(most + _SPARE, width), rounds)[:, :most]
    elif width > largest_gram:
        right = _projected(matrix, count, rounds)
    else:
        right = _of_gram(matrix, count)
    # The eigenvalues of the Gram matrix lose small singular values; the products with its eigenvectors do not.
    left = _times(matrix, right)
    values = left.norm(dim=0)
    values = values[values > _LEAST * values.max()]
    return Components(left[:, : len(values)] / values, values, right[:, : len(values)], energy)


def _of_gram(matrix: Tensor, count: int) -> Tensor:
    """The leading right singular vectors `[in, count]` of a matrix, most important first."""
    vectors: Tensor = torch.linalg.eigh(matrix.T @ matrix).eigenvectors
    return vectors.flip(1)[:, :count]


def _projected(matrix: Tensor, count: int, rounds: int) -> Tensor:
    """The same by random projection, about."""
    generator = torch.Generator().manual_seed(0)  # of its own: workers share that of torch
    start = torch.randn(matrix.shape[1], count, generator=generator)
    basis = _spanned(matrix, start.to(matrix.device))
    for _ in range(rounds):
        basis = _spanned(matrix, _spanned(matrix.T, basis))
    small = (basis.T @ matrix).to(torch.float64)
    # In float64 a Gram matrix loses no singular value that float32 tells from 0, and it is small.
    right = small.T @ torch.linalg.eigh(small @ small.T).eigenvectors.flip(1)
    return normalize(right, dim=0).to(torch.float32)


def _spanned(matrix: Tensor, few: Tensor) -> Tensor:
    """Orthonormal columns that span `matrix @ few`."""
    columns: Tensor = torch.linalg.qr(_times(matrix, few)).Q
    return columns


def _times(matrix: Tensor, few: Tensor) -> Tensor:
    """Compute `matrix @ few`; a CPU is several times as fast with few columns on the left."""
    return (few.T @ matrix.T).T
