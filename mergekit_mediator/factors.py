"""The low-rank part of a stored weight: thin factors, exact as an adapter has them or in coarse steps."""

from dataclasses import dataclass

import torch
from torch import Tensor

# A Gaussian entry in steps of its own standard deviation takes 2.1 bits. On full fine-tunes, more rank
# at this step recovers more of an expert per bit than finer steps at less rank, and coarser ones lose.
STEP = 1.0
# A component of energy σ² takes 2.1 (out + in) bits and, kept to five sixths, saves 0.6 σ²/s² bits in
# coding a remainder of variance s².
_REMAINDER_RATIO = 3.4
_FULL_DECOMPOSITION = 1536
_SMALL = 128
_ROWS = 4096


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

        Factors are stored in one dtype; if these differ, both in the wider one.
        """
        dtype = torch.promote_types(lora_b.dtype, lora_a.dtype)
        scales = torch.full((lora_b.shape[1],), scale, dtype=torch.float32)
        return cls(lora_b.to(dtype), lora_a.T.to(dtype).contiguous(), scales)

    @property
    def rank(self) -> int:
        return self.scales.numel()

    def product(self) -> Tensor:
        """The matrix `[out, in]` in float32."""
        return (self.left.to(torch.float32) * self.scales) @ self.right.to(torch.float32).T

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
        out, width = self.left.shape[0], self.right.shape[0]
        squares = self.values.double().square()
        remaining = (self.energy - squares.cumsum(0)).clamp(min=0)
        least = (_REMAINDER_RATIO / (out * width) * remaining).clamp(min=slope)
        worth = squares >= (out + width) * least
        return int(worth.to(torch.int64).cumprod(0).sum())

    def codes(self) -> tuple[Tensor, Tensor]:
        """All columns in coarse steps: int8 codes `[out, k]` and `[in, k]`."""
        return _codes(self.left), _codes(self.right)

    def quantise(self, rank: int, matrix: Tensor) -> Factors:
        """Factors of int8 codes whose scales bring their product nearest to `matrix` `[out, in]`."""
        left, right = _codes(self.left[:, :rank]), _codes(self.right[:, :rank])
        a, b = left.to(torch.float64), right.to(torch.float64)
        # least squares for the scales: the normal equations of Σ_k s_k a_k b_kᵀ
        gram = (a.T @ a) * (b.T @ b)
        target = (a * (matrix.to(torch.float64) @ b)).sum(0)
        scales = torch.linalg.lstsq(gram, target[:, None]).solution[:, 0]
        return Factors(left, right, scales.to(torch.float32))


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
        return Components(left, values, right, _energy(matrix))
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


def _energy(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2


def _limit(width: int) -> int:
    """How many components are looked at: with more, factors take as much as coding every weight."""
    return width if width <= _SMALL else max(_SMALL, width // 8)


def _codes(vectors: Tensor) -> Tensor:
    """int8 codes `[n, r]` of unit vectors, in steps of their root mean square."""
    step = STEP / vectors.shape[0] ** 0.5
    codes: Tensor = (vectors / step).round_().clamp_(-127, 127)
    return codes.to(torch.int8)
