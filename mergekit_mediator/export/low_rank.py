"""A change of a matrix as two thin factors: exact if the change is such a product, else the nearest product."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from mergekit_mediator.delta.decomposition import decompose
from mergekit_mediator.errors import ExportError
from mergekit_mediator.export.experts import Change

# The components of a random projection that are left out again, and its rounds. With these numbers its squared error is
# within 0.2% of that of a full decomposition.
_OVERSAMPLED, _ROUNDS = 16, 4
_FULL_DECOMPOSITION = 512


@dataclass(frozen=True)
class LowRank:
    """A product left · rightᵀ that approximates a matrix.

    Attributes:
        left: `[out, r]` float32.
        right: `[in, r]` float32.
        squared_norm: the squared norm of the matrix.
        squared_error: the squared norm of the matrix minus the product.
    """

    left: Tensor
    right: Tensor
    squared_norm: float
    squared_error: float

    @property
    def rank(self) -> int:
        """The number of components."""
        return self.left.shape[1]

    def cut(self, rank: int, energy: float = 1.0) -> "LowRank":
        """Return the nearest product of at most this rank, or of the least rank that keeps `energy`, see `low_rank`."""
        if rank >= self.rank and energy >= 1:
            return self
        return _nearest(self, rank, energy)

    def squared_errors(self, ranks: Sequence[int]) -> list[float]:
        """Compute the squared errors of the cuts to these ranks, without making them."""
        # The eigenvalues of RᵀR, seen through a root of LᵀL, are the squared singular values of L Rᵀ.
        left, right = self.left.double(), self.right.double()
        values, vectors = torch.linalg.eigh(left.T @ left)
        root = vectors * values.clamp(min=0).sqrt()
        squares = torch.linalg.eigvalsh(root.T @ (right.T @ right) @ root).clamp(min=0).flip(0)
        return [
            self.squared_error + (float(squares[rank:].sum()) if rank < self.rank else 0.0)
            for rank in ranks
        ]

    def padded(self, rank: int) -> "LowRank":
        """Return the same product, with components of zeros up to this rank."""
        more = (0, max(0, rank - self.rank))
        return replace(self, left=pad(self.left, more), right=pad(self.right, more))


def low_rank(change: Change, dense: Tensor, rank: int, energy: float = 1.0) -> LowRank:
    """Compute the product of at most a rank that is nearest to a change.

    A change that is a sum of thin products stays exact if the ranks sum to at most `rank`. Every other change
    is cut by its singular values, a large matrix by those that a random projection finds, see `delta.decomposition`.

    Args:
        change: the change of a weight `[..., in]` with two or more axes.
        dense: the dense expert's weight.
        rank: the largest rank, at least 1.
        energy: the part in (0, 1] of the squared change that is enough; the rank is the least that keeps it.

    Raises:
        ExportError: the change has a number that is not finite.
    """
    if change.is_factored:
        left, right = side_by_side(
            [
                (c, part.factors.left * part.factors.scales, part.factors.right)
                for c, part in change.parts
                if part.factors
            ]
        )
        return LowRank(left, right, squared_norm(left, right), 0.0).cut(rank, energy)
    matrix = change.tensor(dense)
    matrix = matrix.reshape(-1, matrix.shape[-1])
    norm = float(matrix.double().square().sum())
    if not math.isfinite(norm):
        raise ExportError(
            f"{change.weight}: an adapter needs a finite change, got NaN or infinity: export this expert with "
            "`--format checkpoint`"
        )
    smaller = min(matrix.shape)
    rank = min(rank, smaller)
    if smaller <= _FULL_DECOMPOSITION or rank + _OVERSAMPLED >= smaller:
        u, s, v = (part.float() for part in _triples(matrix))
    else:
        parts = decompose(matrix, most=rank + _OVERSAMPLED, rounds=_ROUNDS)
        u, s, v = parts.left, parts.values, parts.right
    u, s, v = u[:, :rank], s[:rank], v[:, :rank]
    if energy < 1:
        rank = _enough(s, energy * norm)
        u, s, v = u[:, :rank], s[:rank], v[:, :rank]
    root = s.sqrt()
    error = max(0.0, norm - float(s.double().square().sum()))
    return LowRank(u * root, v * root, norm, error)


def side_by_side(parts: Sequence[tuple[float, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the factors `[out, Σr]` and `[in, Σr]`, float32, of a weighted sum of products.

    Args:
        parts: the weight, `left` `[out, r]` and `right` `[in, r]` of each product left · rightᵀ.
    """
    left = torch.cat([left.to(torch.float32) * c for c, left, _ in parts], dim=1)
    right = torch.cat([right.to(torch.float32) for _, _, right in parts], dim=1)
    return left, right


def _nearest(product: LowRank, rank: int, energy: float) -> LowRank:
    """Cut a product of factors; its singular values are those of a matrix `[min(out, r), min(in, r)]`."""
    q_left, r_left = torch.linalg.qr(product.left.double())
    q_right, r_right = torch.linalg.qr(product.right.double())
    u, s, v = _triples(r_left @ r_right.T)
    if energy < 1:
        rank = min(rank, _enough(s, energy * product.squared_norm))
    root = s[:rank].sqrt()
    cut_left = (q_left @ (u[:, :rank] * root)).float()
    cut_right = (q_right @ (v[:, :rank] * root)).float()
    error = product.squared_error + float(s[rank:].square().sum())
    return LowRank(cut_left, cut_right, product.squared_norm, error)


def _triples(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute all singular triples of `[out, in]`: `[out, r]`, `[r]` and `[in, r]` float64, the largest value first.

    They come from the Gram matrix of the smaller side: LAPACK's singular value decomposition does not converge for some
    changes of real fine-tunes. What float64 loses of the smallest values is below the rounding of float32. Where a value
    is 0, its left vector (of a wide matrix the right one) is 0, too.
    """
    if matrix.shape[0] < matrix.shape[1]:
        right, values, left = _triples(matrix.T)
        return left, values, right
    wide = matrix.double()
    right = torch.linalg.eigh(wide.T @ wide).eigenvectors.flip(1)
    left = wide @ right
    values = left.norm(dim=0)
    return left / values.clamp(min=torch.finfo(torch.float64).tiny), values, right


def _enough(values: Tensor, energy: float) -> int:
    """Return how many of the singular values, largest first, have squares that sum to at least `energy`."""
    sums = values.double().square().cumsum(0)
    return min(len(values), 1 + int((sums < energy).sum()))


def squared_norm(left: Tensor, right: Tensor) -> float:
    """Compute the squared norm of left · rightᵀ from the factors `[out, r]` and `[in, r]` alone."""
    a, b = left.double(), right.double()
    return float(((a.T @ a) * (b.T @ b)).sum())
