"""`iso_c`: the sum of the task vectors with all its singular values made equal."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_mediator.methods.task_vector_method import (
    ModelWeight,
    TaskVectorMethod,
    mean,
    task_vector_spec,
)


class IsoC(TaskVectorMethod):
    """Isotropic merging in the common subspace: Marczak et al., "No Task Left Behind" (2025), algorithm 1.

    With Σ_t τ_t = U diag(σ) Vᵀ, the merged task vector is σ̄ U Vᵀ, where σ̄ is the mean of σ. A direction in which
    no expert changes anything has no singular vectors of its own, and gets no change here either. Weights that
    are no matrices get the mean of the task vectors.
    """

    spec = task_vector_spec("iso_c", "Iso-C", "https://arxiv.org/abs/2502.04959")

    def combine(self, weight: ModelWeight, parameters: Mapping[str, Any]) -> Tensor:
        """See the class."""
        if not weight.is_matrix:
            return mean(weight)
        left, values, right = torch.linalg.svd(weight.taus.sum(dim=0), full_matrices=False)
        smallest = values[0] * max(weight.base.shape) * torch.finfo(values.dtype).eps
        equal: Tensor = (left * (values.mean() * (values > smallest))) @ right
        return equal
