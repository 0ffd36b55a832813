"""The low-rank part of a stored weight: two thin factors, either those of an adapter or codes in coarse steps."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mergekit_mediator.delta.factor_steps import LEAST_SLOPES, codes, fineness
from mergekit_mediator.delta.full_precision import full_precision

# A component of energy σ² takes 2.1 (out + in) bits. Stored to five sixths, it saves 0.6 σ²/s² bits in coding a
# remainder of variance s². The ratio is 2.1 / 0.6, about.
_REMAINDER_RATIO = 3.4
_ROWS = 4096  # of a matrix that is copied to float64, at once
# Two rounds reduce the remaining squared error by about 1%, a third one by 0.1% more.
_REFITS = 2
_TINY = 1e-30
# Of a squared norm: the rounding of float32 and its sums leave less, and the components of no fine-tune do.
_ROUNDING = 1e-5
_WITHIN = 0.499  # steps around a code; each number there rounds to the code


@dataclass(frozen=True)
class Factors:
    """Σ_k scale_k · left_k · right_kᵀ.

    Attributes:
        left: `[out, r]`, int8 codes, or the floats of an adapter.
        right: `[in, r]`, of the same dtype.
        scales: `[r]` float32.
    """

    left: Tensor
    right: Tensor
    scales: Tensor

    @classmethod
    def of_adapter(cls, lora_b: Tensor, lora_a: Tensor, scale: float) -> "Factors":
        """Take the factors of a LoRA adapter, `scale · B A`, without a loss.

        Both factors get the wider of the two dtypes. If r is larger than the rank of any matrix `[out, in]`,
        B A takes fewer numbers and replaces them, rounded to float32 once.

        Args:
            lora_b: B `[out, r]`, any floating dtype.
            lora_a: A `[r, in]`, any floating dtype.
            scale: of the product.
        """
        dtype = torch.promote_types(lora_b.dtype, lora_a.dtype)
        (out, rank), width = lora_b.shape, lora_a.shape[1]
        if rank > min(out, width):
            dtype, rank = torch.promote_types(dtype, torch.float32), min(out, width)
            product = lora_b.to(torch.float64) @ lora_a.to(torch.float64)
            one = torch.eye(rank, device=product.device)
            lora_b, lora_a = (one, product) if rank == out else (product, one)
        scales = torch.full((rank,), scale, dtype=torch.float32, device=lora_b.device)
        return cls(lora_b.to(dtype), lora_a.T.to(dtype).contiguous(), scales)

    @property
    def rank(self) -> int:
        """The number of components r."""
        return self.scales.numel()

    @full_precision()
    def product(self) -> Tensor:
        """Compute the matrix `[out, in]` in float32."""
        return (self.left.to(torch.float32) * self.scales) @ self.right.to(torch.float32).T

    def scaled(self, factor: float) -> "Factors":
        """Give the factors of the matrix times a number."""
        return Factors(self.left, self.right, self.scales * factor)

    def to(self, device: torch.device) -> "Factors":
        """Copy the factors to a device."""
        return Factors(self.left.to(device), self.right.to(device), self.scales.to(device))


@dataclass(frozen=True)
class Components:
    """The leading part of a singular value decomposition.

    Attributes:
        left: `[out, k]` float32, orthonormal columns.
        values: `[k]` float32, the singular values, descending.
        right: `[in, k]` float32, orthonormal columns.
        energy: squared Frobenius norm of the whole matrix.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    energy: float

    @cached_property
    def squares(self) -> Tensor:
        """The squared singular values, `[k]` float64, on the CPU: choices among a few numbers are faster there."""
        return self.values.cpu().double().square()

    @cached_property
    def _remaining(self) -> Tensor:
        """The squared norm that remains after each component, `[k]` float64."""
        return (self.energy - self.squares.cumsum(0)).clamp(min=0)

    def is_whole(self, rank: int) -> bool:
        """Whether fewer components than a matrix can have are all of it, as those of an adapter's change, but for rounding."""
        fewer = 0 < rank < min(len(self.left), len(self.right))
        return fewer and float(self._remaining[rank - 1]) <= _ROUNDING * self.energy

    def rank(self, slope: float) -> int:
        """Count the components that save at least `slope` of squared error per stored number.

        A component must also save more bits in coding the remainder, weight by weight, than it takes.
        """
        return self.fineness(slope).numel()

    def storable(self) -> "Components":
        """Leave out the components that are stored at no slope. Nothing that depends on a slope changes."""
        rank = self.rank(0.0)
        return Components(
            self.left[:, :rank], self.values[:rank], self.right[:, :rank], self.energy
        )

    def fineness(self, slope: float) -> Tensor:
        """Choose the fineness of each component that is stored at this slope; see `factor_steps`.

        Returns:
            `[rank]` int64, on the CPU.
        """
        ranks, chosen = self.finenesses(torch.tensor([slope], dtype=torch.float64))
        return chosen[0, : int(ranks)]

    def finenesses(self, slopes: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the fineness of each component at each of many slopes, see `fineness`.

        Args:
            slopes: `[n]` float64.

        Returns:
            The rank at each slope `[n]`, and the fineness of each component `[n, k]`, which counts for the
            components up to that rank. Both are int64, on the CPU.
        """
        out, width = self.left.shape[0], self.right.shape[0]
        if not self.values.numel():
            return slopes.new_zeros(len(slopes), dtype=torch.int64), torch.empty(
                len(slopes), 0, dtype=torch.int64
            )
        least = _REMAINDER_RATIO / (out * width) * self._remaining
        least = torch.maximum(least, slopes[:, None]) * (out + width)
        stored = self.squares >= LEAST_SLOPES * least
        ranks = stored.to(torch.int64).cumprod(1).sum(1)
        last = least.gather(1, (ranks - 1).clamp(min=0)[:, None])
        return ranks, fineness(self.squares, out + width, last / (out + width))

    @full_precision()
    def quantise(self, slope: float, matrix: Tensor) -> Factors | None:
        """Round the components to int8 codes whose scales bring their product nearest to a matrix.

        Args:
            slope: squared error per stored number, > 0.
            matrix: `[out, in]` float32, the matrix of which these are the components.

        Returns:
            The factors, or None if no component is worth its numbers.
        """
        return self.rounded(self.fineness(slope), matrix)

    @full_precision()
    def rounded(self, chosen: Tensor, matrix: Tensor) -> Factors | None:
        """Round the first components to int8 codes whose scales bring their product nearest to a matrix.

        Args:
            chosen: `[rank]` int64, the fineness of each, see `factor_steps`.
            matrix: `[out, in]` float32, the matrix of which these are the components.

        Returns:
            The factors, or None for rank 0.
        """
        if not chosen.numel():
            return None
        left = codes(self.left[:, : chosen.numel()], chosen)
        right = codes(self.right[:, : chosen.numel()], chosen)
        for _ in range(_REFITS):
            left = codes(_refit(matrix, right), chosen)
            right = codes(_refit(matrix.T, left), chosen)
        # Columns with codes of more than half a byte come first. `factor_codec` stores the others two a byte.
        large = torch.maximum(left.abs().amax(0), right.abs().amax(0)) > 7
        order = large.logical_not().to(torch.int64).argsort(stable=True)
        left, right = left[:, order], right[:, order]
        a, b = left.to(torch.float64), right.to(torch.float64)
        # The normal equations of Σ_k s_k a_k b_kᵀ give the scales of least squared error.
        gram = (a.T @ a) * (b.T @ b)
        rows = torch.split(matrix, _ROWS)  # a copy in float64 would take twice the matrix
        target = (a * torch.cat([part.to(torch.float64) @ b for part in rows])).sum(0)
        # The CPU solves them even if the matrix has not full rank.
        scales = torch.linalg.lstsq(gram.cpu(), target.cpu()[:, None]).solution[:, 0]
        return Factors(left, right, scales.to(matrix))


def _refit(matrix: Tensor, other: Tensor) -> Tensor:
    """Unit vectors `[n, r]` whose multiples, with `other` `[m, r]`, come nearest to a matrix `[n, m]`.

    One side makes up for part of the error that rounding caused on the other one (alternating least squares).
    """
    b = other.to(torch.float32)
    # Rounded vectors of small matrices may depend on each other, and then there is no plain inverse.
    inverse = torch.linalg.pinv((b.T @ b).to(torch.float64), hermitian=True)
    return normalize((matrix @ b) @ inverse.to(torch.float32), dim=0, eps=_TINY)


@full_precision()
def unrounded(matrix: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """Find the numbers that round to the codes of factors and bring the product nearest to a matrix.

    Each side is fitted to the matrix with the codes of the other side.

    Args:
        matrix: `[out, in]` float32, the matrix that the factors approximate.
        factors: of int8 codes.

    Returns:
        `[out, r]` and `[in, r]`, float32, in units of the codes.
    """
    left, right = factors.left.to(matrix), factors.right.to(matrix)
    return _towards(left, _refit(matrix, right)), _towards(right, _refit(matrix.T, left))


def _towards(codes: Tensor, vectors: Tensor) -> Tensor:
    """Vectors in units of codes `[n, r]`, clamped so that they round to the codes."""
    units = (codes * vectors).sum(0) / vectors.square().sum(0).clamp(min=_TINY)
    return torch.minimum(torch.maximum(vectors * units, codes - _WITHIN), codes + _WITHIN)


def squared_norm(numbers: Tensor) -> float:
    """Sum the squares of numbers of any shape and floating dtype, in float64."""
    return float(torch.linalg.vector_norm(numbers, dtype=torch.float64)) ** 2
