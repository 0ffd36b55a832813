"""A change of a matrix as two thin factors: exact where it is a product of factors, else the nearest one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from mergekit_mediator.export.experts import Change

# Components that a random projection looks at besides those that are wanted, and its rounds: with these the
# squared error is within 0.1% of that of a full decomposition (tests/export/test_low_rank.py).
_OVERSAMPLED, _ROUNDS = 16, 4
_FULL_DECOMPOSITION = 512


@dataclass(frozen=True)
class LowRank:
    """The product left · rightᵀ, near a matrix.

    Attributes:
        left: `[out, r]` float32.
        right: `[in, r]` float32.
        squared_norm: of the matrix.
        squared_error: of the product.
    """

    left: Tensor
    right: Tensor
    squared_norm: float
    squared_error: float

    @property
    def rank(self) -> int:
        """The number of components."""
        return self.left.shape[1]

    def cut(self, rank: int) -> "LowRank":
        """The nearest product of at most this rank."""
        if rank >= self.rank:
            return self
        return _nearest(self.left, self.right, rank, self.squared_norm, self.squared_error)

    def padded(self, rank: int) -> "LowRank":
        """The same product, with zeros for components that are missing to a rank."""
        more = (0, max(0, rank - self.rank))
        return replace(self, left=pad(self.left, more), right=pad(self.right, more))


def low_rank(change: Change, dense: Tensor, rank: int) -> LowRank:
    """The product of at most a rank that is nearest to a change of a matrix.

    A change that is a sum of thin products of that rank or less stays exactly what it is. All other changes
    are cut by their singular values: exactly where they are small, else by random projection (Halko,
    Martinsson and Tropp, arXiv 0909.4061).

    Args:
        change: of a weight of two or more axes, the last of which is the input.
        dense: the dense expert's weight.
        rank: at least 1.
    """
    if change.is_factored:
        left, right = side_by_side(
            [
                (c, part.factors.left * part.factors.scales, part.factors.right)
                for c, part in change.parts
                if part.factors
            ]
        )
        norm = _squared_norm(left, right)
        product = LowRank(left, right, norm, 0.0)
        return product.cut(rank)
    matrix = change.tensor(dense)
    matrix = matrix.reshape(-1, matrix.shape[-1])
    norm = float(matrix.double().square().sum())
    smaller = min(matrix.shape)
    rank = min(rank, smaller)
    if smaller <= _FULL_DECOMPOSITION or rank + _OVERSAMPLED >= smaller:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        u, s, v = u[:, :rank], s[:rank], vh[:rank].T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # svd_lowrank takes no generator; equal artifacts give equal files
            u, s, v = torch.svd_lowrank(matrix, q=rank + _OVERSAMPLED, niter=_ROUNDS)
        u, s, v = u[:, :rank], s[:rank], v[:, :rank]
    root = s.sqrt()
    error = max(0.0, norm - float(s.double().square().sum()))
    return LowRank(u * root, v * root, norm, error)


def side_by_side(parts: Sequence[tuple[float, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Factors `[out, Σr]` and `[in, Σr]` in float32 of a weighted sum of products `left · rightᵀ`."""
    left = torch.cat([left.to(torch.float32) * c for c, left, _ in parts], dim=1)
    right = torch.cat([right.to(torch.float32) for _, _, right in parts], dim=1)
    return left, right


def _nearest(left: Tensor, right: Tensor, rank: int, norm: float, error: float) -> LowRank:
    """Cut a product of thin factors: the singular values are those of a small core."""
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double())
    u, s, vh = torch.linalg.svd(r_left @ r_right.T)
    root = s[:rank].sqrt()
    cut_left = (q_left @ (u[:, :rank] * root)).float()
    cut_right = (q_right @ (vh[:rank].T * root)).float()
    return LowRank(cut_left, cut_right, norm, error + float(s[rank:].square().sum()))


def _squared_norm(left: Tensor, right: Tensor) -> float:
    """Of left · rightᵀ, without making it."""
    a, b = left.double(), right.double()
    return float(((a.T @ a) * (b.T @ b)).sum())
