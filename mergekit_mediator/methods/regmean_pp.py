"""RegMean++: each matrix as the best linear answer to the inputs that it gets after the merged blocks before it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_mediator.methods.prompt_method import PromptMethod, figures_of, prompt_spec
from mergekit_mediator.methods.singular import row_blocks, wide
from mergekit_mediator.methods.task_vector_method import Fraction, ModelWeight, shared

# The part of the mean square of the inputs that is added to all of them, so that a solution exists.
_RIDGE = 1e-6


class RegmeanPp(PromptMethod):
    """Nguyen et al. (2025), arXiv 2508.03121, which takes up RegMean (Jin et al., 2022, arXiv 2212.09849).

    τ = (Σ_t τ_t G_t) (Σ_t G_t)⁻¹ with G_t = r·C_t + (1 − r)·diag(C_t). C_t is the mean of xᵀx over the
    inputs x of the matrix in expert t's own block, on its prompts and answers, which went through the merged blocks before it. Other
    weights, embeddings and the head get the mean of the task vectors.

    The figures of a weight are τ, `[*shape]`, before `lambda`.
    """

    reads = 4
    memory = 4
    disk = 4
    spec = prompt_spec(
        "regmean_pp",
        "RegMean++",
        "https://arxiv.org/abs/2508.03121",
        shared("off_diagonal", Fraction, 0.95),
    )

    def combine(self, weight: ModelWeight, parameters: Mapping[str, Any]) -> Tensor:
        """Give the merged task vector `[*shape]` float32, which was computed block by block."""
        return figures_of(parameters, weight.name, weight.taus)


class RegressionMean:
    """(Σ_t τ_t G_t) (Σ_t G_t)⁻¹ of experts that come one by one."""

    def __init__(self, off_diagonal: float) -> None:
        """Start without experts.

        Args:
            off_diagonal: r, in (0, 1].
        """
        self._off_diagonal = off_diagonal
        self._weighted: Tensor | None = None
        self._total: Tensor | None = None

    def add(self, tau: Tensor, products: Tensor) -> None:
        """Add one expert.

        Args:
            tau: its task vector `[out, in]` float32.
            products: C_t `[in, in]` float32.
        """
        diagonal = wide(products.diagonal())
        gram = wide(products) * self._off_diagonal
        gram.diagonal().copy_(diagonal + _RIDGE * diagonal.mean() + torch.finfo(gram.dtype).tiny)
        weighted = torch.cat([wide(tau[rows]) @ gram for rows in row_blocks(len(tau))])
        self._weighted = weighted if self._weighted is None else self._weighted + weighted
        self._total = gram if self._total is None else self._total + gram

    def merged(self) -> Tensor:
        """Solve for the merged task vector, `[out, in]` float32."""
        if self._weighted is None or self._total is None:
            raise TypeError("at least one expert required")
        merged: Tensor = torch.linalg.solve(self._total, self._weighted, left=False)
        return merged.to(torch.float32)
