"""How others store the change of a matrix: a few lines each, from their papers' formulas, without data.

Each form takes the change of a weight as a matrix `[out, in]` in float32 and gives an approximation of it and
the bits that the paper counts. Bits of scales and indices are counted where the paper has any.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

HALF = 16  # bits of a number in bfloat16
# Delta-CoMe's run.sh: of each matrix 2 directions take 8 bits a number, 32 take 3, and the others take 2.
COME = ((8, 2), (3, 32), (2, None))


@dataclass(frozen=True)
class Decomposition:
    """All singular triples of a matrix: left `[out, r]`, values `[r]` from the largest on, right `[in, r]`."""

    left: Tensor
    values: Tensor
    right: Tensor

    @classmethod
    def of(cls, matrix: Tensor, device: str = "cpu") -> Decomposition:
        """Decompose by the eigenvectors of the smaller Gram matrix, in float64 on a device."""
        if matrix.shape[0] < matrix.shape[1]:
            other = cls.of(matrix.T, device)
            return cls(other.right, other.values, other.left)
        double = matrix.to(device).double()
        squares, right = torch.linalg.eigh(double.T @ double)
        values, right = squares.flip(0).clamp(min=0).sqrt(), right.flip(1)
        known = values > 1e-7 * values[0]
        values, right = values[known], right[:, known]
        triples = (double @ right / values, values, right)
        return cls(*(part.float().to(matrix.device) for part in triples))


@dataclass(frozen=True)
class Stored:
    """An approximation `[out, in]` in float32, and the bits that it takes."""

    approximation: Tensor
    bits: float


def low_rank(parts: Decomposition, rank: int) -> Stored:
    """The leading triples in bfloat16, as `mergekit-extract-lora` stores them."""
    rank = min(rank, parts.values.numel())
    left = (parts.left[:, :rank] * parts.values[:rank]).bfloat16().float()
    right = parts.right[:, :rank].bfloat16().float()
    return Stored(left @ right.T, HALF * (left.numel() + right.numel()))


def one_bit(matrix: Tensor, rounds: int = 1) -> Stored:
    """α·sign(Δ) with α = mean |Δ|, which is nearest (BitDelta, arXiv 2402.10193); again for what is left."""
    left = matrix.clone()
    for _ in range(rounds):
        left -= left.abs().mean() * _sign(left)
    return Stored(matrix - left, rounds * (matrix.numel() + HALF))


def by_singular_value(parts: Decomposition, bits: float) -> Stored:
    """8, 3 and 2 bits for triples of falling value, as many as fit (Delta-CoMe, arXiv 2406.08903).

    The paper rounds by GPTQ, which needs prompts. Here each vector takes the step of least squared error.
    """
    numbers = parts.left.shape[0] + parts.right.shape[0]
    approximation = parts.left.new_zeros(parts.left.shape[0], parts.right.shape[0])
    spent, first = 0.0, 0
    for width, most in COME:
        price = width * numbers + 2 * HALF
        count = min(int((bits - spent) / price), parts.values.numel() - first)
        count = count if most is None else min(count, most)
        chosen = slice(first, first + max(0, count))
        left = rounded(parts.left[:, chosen] * parts.values[chosen], width)
        approximation += left @ rounded(parts.right[:, chosen], width).T
        spent, first = spent + price * max(0, count), chosen.stop
    return Stored(approximation, spent)


def sign_first(matrix: Tensor, remainder: Decomposition, rank: int) -> Stored:
    """One bit a weight, then the leading triples of what that leaves (D-QReLO's order, arXiv 2604.16940).

    The remainder is that of `one_bit`.
    """
    coarse, fine = one_bit(matrix), low_rank(remainder, rank)
    return Stored(coarse.approximation + fine.approximation, coarse.bits + fine.bits)


def ternary(matrices: Mapping[str, Tensor], density: float) -> dict[str, Stored]:
    """The largest part of all numbers of an expert as a sign and one scale (ComPEFT, arXiv 2311.13171).

    The paper chooses the scale, α·std(Δ), on a validation set; here it is the one of least squared error, the
    mean of the magnitudes that are kept. Positions cost their entropy, as the paper counts.
    """
    magnitudes = torch.cat([matrix.abs().flatten() for matrix in matrices.values()])
    count = max(1, round(density * magnitudes.numel()))
    threshold = magnitudes.kthvalue(magnitudes.numel() - count + 1).values
    kept = magnitudes > threshold
    # of equal magnitudes, of which differences of bfloat16 weights have many, the first ones
    equal = ((magnitudes == threshold) & (magnitudes > 0)).nonzero()[:, 0]
    kept[equal[: count - int(kept.sum())]] = True
    share = float(kept.double().mean())
    scale, price = magnitudes[kept].mean(), share + entropy(share)
    masks = kept.split([matrix.numel() for matrix in matrices.values()])
    return {
        name: Stored(
            scale * matrix.sign() * mask.view_as(matrix),
            price * matrix.numel() + HALF / len(matrices),
        )
        for (name, matrix), mask in zip(matrices.items(), masks, strict=True)
    }


def entropy(share: float) -> float:
    """Bits that say whether something of this share happens; 0 for shares 0 and 1."""
    return -sum(p * math.log2(p) for p in (share, 1 - share) if p > 0)


def rounded(vectors: Tensor, bits: int) -> Tensor:
    """Columns of 2^bits levels, symmetric about 0, each with the step of least squared error of sixteen."""
    top = vectors.abs().amax(0) if vectors.numel() else vectors.new_zeros(vectors.shape[1])
    half = 2 ** (bits - 1)
    best, least = torch.zeros_like(vectors), torch.full_like(top, torch.inf)
    for clip in torch.linspace(1 / 16, 1, 16).tolist():
        step = (top * clip / (half - 0.5)).clamp(min=torch.finfo(torch.float32).tiny)
        levels = ((vectors / step).floor() + 0.5).clamp(0.5 - half, half - 0.5) * step
        error = (levels - vectors).square().sum(0)
        best = torch.where(error < least, levels, best)
        least = torch.minimum(error, least)
    return best


def _sign(numbers: Tensor) -> Tensor:
    """1 or -1: one bit has no zero."""
    return torch.where(numbers < 0, -1.0, 1.0)
