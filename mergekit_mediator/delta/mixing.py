"""The mixture of a weight: it is put into the dense weight in place, and taken out again bit for bit."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_mediator.delta.factors import Factors
from mergekit_mediator.delta.float_bits import bit_patterns
from mergekit_mediator.delta.full_precision import full_precision
from mergekit_mediator.delta.stored_weight import StoredWeight


@dataclass(frozen=True)
class Displaced:
    """The dense weights that a mixture overwrites.

    Attributes:
        positions: `[k]`, flat; None for all positions.
        weights: `[k]`, the dense expert's weights there.
    """

    positions: Tensor | None
    weights: Tensor


def displace(weight: Tensor, parts: Sequence[tuple[float, StoredWeight]]) -> list[Displaced]:
    """Copy the dense weights that `mix_` will overwrite, for `restore_`; the weight stays as it is.

    Args:
        weight: contiguous, holding the dense expert's weight.
        parts: as for `mix_`.
    """
    flat = weight.view(-1)
    if any(s.factors for _, s in parts):
        return [Displaced(None, flat.clone())]
    return [Displaced(s.positions, flat.index_select(0, s.positions)) for _, s in parts]


def mix_(
    weight: Tensor,
    parts: Sequence[tuple[float, StoredWeight]],
    displaced: Sequence[Displaced] | None = None,
) -> Sequence[Displaced]:
    """Put a mixture into a weight: W ← W + Σ_t c_t Δ_t, summed in float32 and rounded once.

    A single expert with coefficient 1 and no factors is put in place as stored, without arithmetic.

    Args:
        weight: contiguous, holding the dense expert's weight.
        parts: the coefficient c_t and the stored weight of each expert, on the device of `weight`; see
            `StoredWeight.coefficient`.
        displaced: from `displace`, for a caller that must hold it before the weight changes.

    Returns:
        The dense weights that the mixture has overwritten, for `restore_`.
    """
    flat = weight.view(-1)
    displaced = displace(weight, parts) if displaced is None else displaced
    if len(parts) == 1:
        (coefficient, stored), (saved,) = parts[0], displaced
        if coefficient == 1.0 and stored.factors is None:
            put_(flat, saved.positions, stored.weights(saved.weights))
            return displaced
    factored = [(c, stored.factors) for c, stored in parts if stored.factors]
    factors_alone = not any(stored.positions.numel() for _, stored in parts)
    # The range of float16 is too small for the factors' scales.
    if factored and factors_alone and weight.dtype != torch.float16:
        _add_products_(flat.view(-1, weight.shape[-1]), factored)
        return displaced
    mixed = flat.to(torch.float32, copy=True)
    for coefficient, stored in parts:
        if stored.positions.numel():
            difference = stored.difference(flat.index_select(0, stored.positions))
            mixed.index_add_(0, stored.positions, difference, alpha=coefficient)
    if factored:
        _add_products_(mixed.view(-1, weight.shape[-1]), factored)
    flat.copy_(mixed)
    return displaced


@full_precision()
def _add_products_(matrix: Tensor, factored: Sequence[tuple[float, Factors]]) -> None:
    """Add the low-rank parts of all experts to a matrix `[out, in]` in one product.

    The factors take the dtype of the matrix. The product sums in float32 and rounds once, and needs no
    other copy of the matrix.
    """
    left, right = factor_products(factored)
    matrix.addmm_(left.to(matrix.dtype), right.to(matrix.dtype).T)


def factor_products(factored: Sequence[tuple[float, Factors]]) -> tuple[Tensor, Tensor]:
    """Give the matrices `[out, Σr]` and `[in, Σr]`, float32, whose product is the sum of c · Δ of low-rank parts."""
    left = torch.cat([f.left.to(torch.float32) * (c * f.scales) for c, f in factored], dim=1)
    return left, torch.cat([f.right.to(torch.float32) for _, f in factored], dim=1)


def restore_(weight: Tensor, displaced: Sequence[Displaced]) -> None:
    """Put the dense weights back into a weight, bit for bit."""
    flat = weight.view(-1)
    for saved in displaced:
        put_(flat, saved.positions, saved.weights)


def put_(flat: Tensor, positions: Tensor | None, values: Tensor) -> None:
    """Overwrite weights as bits: on a CPU, scattering integers takes half as long as scattering bfloat16.

    Args:
        flat: the weights, flat.
        positions: `[k]`; None for all of them.
        values: `[k]`, in the dtype of the weights.
    """
    if positions is None:
        flat.copy_(values)
    else:
        bit_patterns(flat).scatter_(0, positions.to(torch.int64), bit_patterns(values))
