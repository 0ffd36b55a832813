"""The low-rank part of a stored weight: thin factors, exact as an adapter has them or in coarse steps."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mergekit_mediator.delta.factor_steps import LEAST_SLOPES, codes, fineness

# A component of energy σ² takes 2.1 (out + in) bits and, kept to five sixths, saves 0.6 σ²/s² bits in
# coding a remainder of variance s².
_REMAINDER_RATIO = 3.4
_FULL_DECOMPOSITION = 1536
_SMALL = 128
_ROWS = 4096
# Two rounds take about 1% off the squared error that is left out, a third one 0.1% more.
_REFITS = 2
_TINY = 1e-30
_WITHIN = 0.499  # of a step: what rounds to the same code


@dataclass(frozen=True)
class Factors:
    """Σ_k scale_k · left_k · right_kᵀ.

    Attributes:
        left: `[out, r]`, int8 codes, or floats as they came in with an adapter.
        right: `[in, r]`, in the same dtype.
        scales: `[r]` float32.
    """

    left: Tensor
    right: Tensor
    scales: Tensor

    @classmethod
    def of_adapter(cls, lora_b: Tensor, lora_a: Tensor, scale: float) -> "Factors":
        """The factors of a LoRA adapter as they are: `scale · B A`, with B `[out, r]` and A `[r, in]`.

        Factors are stored in one dtype; if these differ, both in the wider one. If r is larger than the
        rank of any matrix `[out, in]`, B A takes fewer numbers and is kept instead, rounded to float32 once.
        """
        dtype = torch.promote_types(lora_b.dtype, lora_a.dtype)
        (out, rank), width = lora_b.shape, lora_a.shape[1]
        if rank > min(out, width):
            dtype, rank = torch.promote_types(dtype, torch.float32), min(out, width)
            product, one = lora_b.to(torch.float64) @ lora_a.to(torch.float64), torch.eye(rank)
            lora_b, lora_a = (one, product) if rank == out else (product, one)
        scales = torch.full((rank,), scale, dtype=torch.float32)
        return cls(lora_b.to(dtype), lora_a.T.to(dtype).contiguous(), scales)

    @property
    def rank(self) -> int:
        return self.scales.numel()

    def product(self) -> Tensor:
        """The matrix `[out, in]` in float32."""
        return (self.left.to(torch.float32) * self.scales) @ self.right.to(torch.float32).T

    def scaled(self, factor: float) -> "Factors":
        """The factors of a multiple of the matrix."""
        return Factors(self.left, self.right, self.scales * factor)

    def to(self, device: torch.device) -> "Factors":
        """The same factors on a device."""
        return Factors(self.left.to(device), self.right.to(device), self.scales.to(device))


@dataclass(frozen=True)
class Components:
    """The leading part of a singular value decomposition.

    Attributes:
        left: `[out, k]`, orthonormal columns.
        values: `[k]`, descending.
        right: `[in, k]`, orthonormal columns.
        energy: squared Frobenius norm of the whole matrix.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    energy: float

    def rank(self, slope: float) -> int:
        """How many components save at least `slope` of squared error per stored number.

        A component must also save more bits in coding the remainder weight by weight than it takes.
        """
        return self.fineness(slope).numel()

    def fineness(self, slope: float) -> Tensor:
        """That of each component which is kept at this slope, `[rank]` int64; see `factor_steps`."""
        out, width = self.left.shape[0], self.right.shape[0]
        squares = self.values.double().square()
        remaining = (self.energy - squares.cumsum(0)).clamp(min=0)
        least = (_REMAINDER_RATIO / (out * width) * remaining).clamp(min=slope) * (out + width)
        rank = int((squares >= LEAST_SLOPES * least).to(torch.int64).cumprod(0).sum())
        if rank == 0:
            return torch.empty(0, dtype=torch.int64)
        return fineness(squares[:rank], out + width, float(least[rank - 1]) / (out + width))

    def quantise(self, slope: float, matrix: Tensor) -> Factors | None:
        """Factors of int8 codes whose scales bring their product nearest to `matrix` `[out, in]`."""
        chosen = self.fineness(slope)
        if not chosen.numel():
            return None
        left = codes(self.left[:, : chosen.numel()], chosen)
        right = codes(self.right[:, : chosen.numel()], chosen)
        for _ in range(_REFITS):
            left = codes(_refit(matrix, right), chosen)
            right = codes(_refit(matrix.T, left), chosen)
        # those whose codes need more than half a byte come first, which the stored form makes use of
        large = torch.maximum(left.abs().amax(0), right.abs().amax(0)) > 7
        order = large.logical_not().to(torch.int64).argsort(stable=True)
        left, right = left[:, order], right[:, order]
        a, b = left.to(torch.float64), right.to(torch.float64)
        # least squares for the scales: the normal equations of Σ_k s_k a_k b_kᵀ
        gram = (a.T @ a) * (b.T @ b)
        rows = torch.split(matrix, _ROWS)  # a copy in float64 would be twice the matrix
        target = (a * torch.cat([part.to(torch.float64) @ b for part in rows])).sum(0)
        scales = torch.linalg.lstsq(gram, target[:, None]).solution[:, 0]
        return Factors(left, right, scales.to(torch.float32))


def _refit(matrix: Tensor, other: Tensor) -> Tensor:
    """Unit vectors `[n, r]` that, scaled, come nearest to a matrix `[n, m]` together with `other` `[m, r]`.

    What rounding did to one side is partly made good by the other one (alternating least squares).
    """
    b = other.to(torch.float32)
    # rounded vectors of small matrices may depend on each other, so no plain inverse
    inverse = torch.linalg.pinv((b.T @ b).to(torch.float64), hermitian=True)
    return normalize((matrix @ b) @ inverse.to(torch.float32), dim=0, eps=_TINY)


def unrounded(matrix: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """Numbers `[out, r]` and `[in, r]` that round to the codes of the factors, each side as it suits a matrix best
    with the codes of the other.

    Args:
        matrix: `[out, in]` float32, what the factors are of.
        factors: of int8 codes.
    """
    left, right = factors.left.to(matrix), factors.right.to(matrix)
    return _towards(left, _refit(matrix, right)), _towards(right, _refit(matrix.T, left))


def _towards(codes: Tensor, vectors: Tensor) -> Tensor:
    """Vectors in the units of codes `[n, r]`, as far as these do not change."""
    units = (codes * vectors).sum(0) / vectors.square().sum(0).clamp(min=_TINY)
    return torch.minimum(torch.maximum(vectors * units, codes - _WITHIN), codes + _WITHIN)


def decompose(matrix: Tensor) -> Components:
    """The leading components of a float32 matrix `[out, in]`: an eighth of them, or 128.

    Small matrices through the eigenvalues of the Gram matrix in float64, large ones by random projection
    (Halko, Martinsson and Tropp, arXiv 0909.4061).
    """
    out, width = matrix.shape
    if min(out, width) > _FULL_DECOMPOSITION:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(
                0
            )  # svd_lowrank takes no generator; equal inputs are to give equal files
            left, values, right = torch.svd_lowrank(matrix, q=_limit(min(out, width)), niter=3)
        return Components(left, values, right, squared_norm(matrix))
    if out < width:
        other = decompose(matrix.T)
        return Components(other.right, other.values, other.left, other.energy)
    gram = torch.zeros(width, width, dtype=torch.float64)
    for start in range(0, len(matrix), _ROWS):
        rows = matrix[start : start + _ROWS]
        gram.addmm_(rows.T.to(torch.float64), rows.to(torch.float64))
    squares, vectors = torch.linalg.eigh(gram)
    values = squares.flip(0)[: _limit(width)].clamp_(min=0).sqrt()
    # what is below the rounding error of the Gram matrix has no left vector to speak of
    values = values[values > 1e-6 * values[:1]].float()
    right = vectors.flip(1)[:, : values.numel()].float()
    return Components((matrix @ right) / values, values, right, float(gram.trace()))


def squared_norm(numbers: Tensor) -> float:
    """The sum of the squares of float32 numbers of any shape, in float64."""
    return float(torch.linalg.vector_norm(numbers, dtype=torch.float64)) ** 2


def _limit(width: int) -> int:
    """How many components are looked at: with more, factors take as much as coding every weight."""
    return width if width <= _SMALL else max(_SMALL, width // 8)
