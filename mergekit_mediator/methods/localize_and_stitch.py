"""`localize_and_stitch`: the largest changes of every expert, stitched together."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_mediator.methods.order_statistics import flat_chunks, order_statistics
from mergekit_mediator.methods.task_vector_method import (
    Fraction,
    ModelWeight,
    shared,
    task_vector_spec,
)
from mergekit_mediator.methods.whole_model import FIGURES, ModelWeights, WholeModelMethod


class LocalizeAndStitch(WholeModelMethod):
    """Localize-and-Stitch without data: He et al. (2024), sections 3.2 and 3.3.

    Expert t keeps the coordinates m_t where |τ_t| is above the k-th largest magnitude of all its weights, with k
    the `density` of their number. The merged task vector is Σ_t m_t τ_t / Σ_t m_t, and 0 where nobody keeps
    anything. The authors leave embeddings and heads to the base model; give `weight: 0` with a filter for that.
    """

    spec = task_vector_spec(
        "localize_and_stitch",
        "Localize-and-Stitch (without data)",
        "https://arxiv.org/abs/2408.13656",
        shared("density", Fraction, 0.05),
    )
    whole = ("density",)

    def measure(self, weights: ModelWeights, parameters: Mapping[str, Any]) -> Tensor:
        """The smallest magnitude that each expert does not keep, `[experts, 1]`."""
        density = parameters["density"]
        return order_statistics(
            lambda: (part.abs() for weight, _ in weights for part in flat_chunks(weight.taus)),
            lambda count: [count - max(1, int(density * count))],
        )

    def combine(self, weight: ModelWeight, parameters: Mapping[str, Any]) -> Tensor:
        """See the class."""
        limits = parameters[FIGURES].to(weight.taus.device)
        merged = torch.empty_like(weight.taus[0])
        for out, part in zip(flat_chunks(merged[None]), flat_chunks(weight.taus), strict=True):
            kept = part.abs() > limits
            torch.div((part * kept).sum(dim=0), kept.sum(dim=0).clamp(min=1), out=out[0])
        return merged
