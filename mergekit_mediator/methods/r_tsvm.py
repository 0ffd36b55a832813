"""`r_tsvm`: `tsvm` with a weight and a rank of its own for every expert."""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from mergekit_mediator.methods.task_vector_method import (
    ModelWeight,
    TaskVectorMethod,
    mean,
    shared,
    task_vector_spec,
)
from mergekit_mediator.methods.tsvm import orthogonal_sum


class RTsvm(TaskVectorMethod):
    """Reweighted TSV-Merge, after "Mix Data or Merge Models?" (2025).

    The abstract names outlier-aware weights and ranks chosen by sparsity. It is all that we have: the formulas are
    ours. With o_t the part of ‖τ_t‖² that lies beyond `outliers` standard deviations, expert t is weighted by
    (1 + o_t) over the mean of all (1 + o_s): a change with a heavy tail counts for more. With
    d_t = (Σ|τ_t|)² / (N Σ τ_t²) in (0, 1], the density of its change, expert t gets d_t / Σ_s d_s of the smaller
    side as its rank: a sparse change gets fewer directions. Weights that are no matrices get the mean.
    """

    spec = task_vector_spec(
        "r_tsvm",
        "Reweighted TSV-Merge",
        "https://arxiv.org/abs/2502.06876",
        shared("outliers", Annotated[float, Field(gt=0, allow_inf_nan=False)], 3.0),
    )

    def combine(self, weight: ModelWeight, parameters: Mapping[str, Any]) -> Tensor:
        """See the class."""
        if not weight.is_matrix:
            return mean(weight)
        tails = 1 + torch.stack([tail(tau, parameters["outliers"]) for tau in weight.taus])
        densities = torch.stack([density(tau) for tau in weight.taus])
        side, total = min(weight.base.shape), float(densities.sum())
        if not total:
            return torch.zeros_like(weight.taus[0])
        parts = (densities.double() / total * side).tolist()
        # the small addend: equal shares of a side must not be cut by rounding
        ranks = [max(1, int(part + 1e-6)) for part in parts]
        return orthogonal_sum(weight.taus, ranks, tails / tails.mean())


def tail(tau: Tensor, deviations: float) -> Tensor:
    """The part of the squared change beyond so many standard deviations, in [0, 1]; 0 of no change."""
    squares = tau.square()
    total = squares.sum()
    beyond = squares[squares > deviations**2 * squares.mean()].sum()
    return torch.where(total > 0, beyond / total, torch.zeros_like(total))


def density(tau: Tensor) -> Tensor:
    """(Σ|τ|)² / (N Στ²), in (0, 1]: 1 where all magnitudes are equal; 0 of no change."""
    root = tau.square().mean().sqrt()
    ratio = tau.abs().mean() / root
    return torch.where(root > 0, ratio.square(), torch.zeros_like(root))
