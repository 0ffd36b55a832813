"""One low-rank basis for all experts, and coefficients for each, from which every expert is recovered."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_mediator.methods.singular import leading_triples, row_blocks, wide

# A combination of the experts with less than this part of the largest one's squared norm is rounding.
_NOTHING = 1e-12


@dataclass(frozen=True)
class SharedBasis:
    """Matrices of rank one, left_k right_kᵀ. The change of expert t is nearly Σ_k coefficients_tk left_k right_kᵀ.

    Attributes:
        left: `[out, k]` float32.
        right: `[in, k]` float32.
        coefficients: `[experts, k]` float32, in [-1, 1].
    """

    left: Tensor
    right: Tensor
    coefficients: Tensor


def shared_basis(change: Callable[[int], Tensor], experts: int, rank: int) -> SharedBasis | None:
    """Compute the basis in closed form.

    Reversible model merging (Alipour and Amiri, 2025, arXiv 2510.14163) has a closed form for a basis of weights
    and the coefficients of each model. Its abstract is all that we know, and these formulas are ours. Let v_j be the
    eigenvectors of the inner products ⟨Δ_s, Δ_t⟩ of the changes. The matrices B_j = Σ_t v_tj Δ_t give every change
    back, Δ_t = Σ_j v_tj B_j, and the squared error of all experts together is that of all B_j together. So the basis
    is the `rank` largest of the singular triples of all B_j.

    Args:
        change: gives Δ_t by the number of the expert, `[out, in]` float32. At most two changes are in memory at once.
        experts: the number of experts.
        rank: the number k of matrices, at most the smaller side.

    Returns:
        The basis; None if no expert changed anything.
    """
    products = torch.zeros(experts, experts, dtype=torch.float64)
    for t in range(experts):
        own = change(t)
        for s in range(t + 1):
            products[s, t] = products[t, s] = _inner(own, own if s == t else change(s))
    energies, vectors = torch.linalg.eigh(products)
    triples, coefficients = [], []
    for energy, vector in zip(energies.flip(0), vectors.T.flip(0), strict=True):
        if energy <= _NOTHING * energies[-1]:
            break
        combined = change(0) * float(vector[0])
        for t in range(1, experts):
            combined.add_(change(t), alpha=float(vector[t]))
        triples.append(leading_triples(combined, rank))
        coefficients.append(vector.to(combined)[:, None].expand(-1, rank))
        del combined
    if not triples:
        return None
    left, values, right = (torch.cat(parts, dim=-1) for parts in zip(*triples, strict=True))
    largest = values.topk(rank).indices
    root = values[largest].sqrt()
    return SharedBasis(
        left[:, largest] * root,
        right[:, largest] * root,
        torch.cat(coefficients, dim=1)[:, largest],
    )


def _inner(one: Tensor, other: Tensor) -> float:
    """The inner product of two matrices `[out, in]`, summed in float64."""
    blocks = row_blocks(len(one))
    return sum(float((wide(one[rows]) * wide(other[rows])).sum()) for rows in blocks)
