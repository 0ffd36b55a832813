"""Singular vectors through the eigenvectors of the smaller Gram matrix, and the nearest orthonormal matrix."""

import torch
from torch import Tensor

# Of the largest eigenvalue: what lies below it is rounding, and counts as no direction at all.
_NOTHING = 1e-12


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
    taller = wide(matrix)
    squares, vectors = torch.linalg.eigh(taller.mT @ taller)
    vectors = vectors[:, -rank:].flip(1)
    left = taller @ vectors
    values = left.norm(dim=0)
    present = squares[-rank:].flip(0) > _NOTHING * squares[-1].clamp(min=0)
    left = left * torch.where(present, 1 / values, torch.zeros_like(values))
    values = torch.where(present, values, torch.zeros_like(values))
    return left.to(torch.float32), values.to(torch.float32), vectors.to(torch.float32)


def orthonormal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns: the polar factor X (XᵀX)^(-1/2).

    Directions that the columns do not span stay 0, so that columns which are all alike share one direction.

    Args:
        matrix: `[m, n]` float32.

    Returns:
        `[m, n]` float32.
    """
    columns = wide(matrix)
    squares, vectors = torch.linalg.eigh(columns.mT @ columns)
    present = squares > _NOTHING * squares[-1].clamp(min=0)
    inverse = torch.where(present, squares, torch.ones_like(squares)).rsqrt() * present
    polar: Tensor = columns @ ((vectors * inverse) @ vectors.mT)
    return polar.to(torch.float32)
