"""Singular vectors through the eigenvectors of the smaller Gram matrix, and the nearest orthonormal matrix."""

import torch
from torch import Tensor

# So many rows are worked on at once: embeddings have many, and copies in float64 take memory.
_ROWS = 4096


def wide(matrix: Tensor) -> Tensor:
    """The matrix in float64, where its device has it: a Gram matrix squares the range of a matrix."""
    return matrix if matrix.device.type == "mps" else matrix.to(torch.float64)


def leading_triples(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triples of a matrix, most important first.

    An eigendecomposition of the Gram matrix of the smaller side takes less time than a singular value
    decomposition, and all that is needed from the larger side is one product.

    Args:
        matrix: `[m, n]` float32.
        rank: how many, from 1 to the smaller side.

    Returns:
        Left vectors `[m, rank]`, singular values `[rank]` and right vectors `[n, rank]`, float32. The vectors of
        a singular value of 0 are 0 on the larger side.
    """
    if matrix.shape[0] < matrix.shape[1]:
        right, values, left = leading_triples(matrix.mT, rank)
        return left, values, right
    squares, vectors = torch.linalg.eigh(gram(matrix))
    vectors = vectors[:, -rank:].flip(1)
    left = times(matrix, vectors)
    values = left.norm(dim=0)
    present = _present(squares)[-rank:].flip(0)
    left.mul_(torch.where(present, 1 / values, torch.zeros_like(values)))
    return left, values * present, vectors.to(torch.float32)


def orthonormal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns: the polar factor X (XᵀX)^(-1/2).

    Directions that the columns do not span stay 0, so that columns which are all alike share one direction.

    Args:
        matrix: `[m, n]` float32.

    Returns:
        `[m, n]` float32.
    """
    squares, vectors = torch.linalg.eigh(gram(matrix))
    present = _present(squares)
    inverse = torch.where(present, squares, torch.ones_like(squares)).rsqrt() * present
    return times(matrix, (vectors * inverse) @ vectors.mT)


def gram(matrix: Tensor) -> Tensor:
    """XᵀX.

    Args:
        matrix: `[m, n]` float32.

    Returns:
        `[n, n]`, in the dtype of `wide`.
    """
    total = wide(matrix.new_zeros(matrix.shape[1], matrix.shape[1]))
    for rows in row_blocks(len(matrix)):
        wider = wide(matrix[rows])
        total.addmm_(wider.mT, wider)
    return total


def times(matrix: Tensor, factor: Tensor) -> Tensor:
    """A product that is rounded once.

    Args:
        matrix: `[m, n]` float32.
        factor: `[n, k]`, in the dtype of `wide`.

    Returns:
        `[m, k]` float32.
    """
    product = matrix.new_empty(matrix.shape[0], factor.shape[1])
    for rows in row_blocks(len(matrix)):
        product[rows] = wide(matrix[rows]) @ factor
    return product


def _present(squares: Tensor) -> Tensor:
    """Tell which ascending eigenvalues of a Gram matrix are more than rounding."""
    rounding = 10 * len(squares) * torch.finfo(squares.dtype).eps
    return squares > squares[-1].clamp(min=0) * rounding


def row_blocks(count: int) -> list[slice]:
    """Slices that cover so many rows, each few enough to be copied."""
    return [slice(first, first + _ROWS) for first in range(0, count, _ROWS)]
