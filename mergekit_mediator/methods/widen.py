"""`widen`: every input column of a weight from the experts that changed its magnitude and direction most."""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from mergekit_mediator.methods.task_vector_method import (
    Finite,
    ModelWeight,
    TaskVectorMethod,
    shared,
    task_vector_spec,
)

# What embeddings are called in the architectures of transformers; their columns are their rows, one a token.
_EMBEDDINGS = ("embed_tokens", "word_embeddings", "embed_in", "tok_embeddings", "wte")
_TINY = torch.finfo(torch.float32).tiny


class Widen(TaskVectorMethod):
    """WIDEN: Yu et al., "Extend Model Merging from Fine-Tuned to Pre-Trained LLMs via Weight Disentanglement" (2024).

    Each column of a matrix (each row of an embedding) has a magnitude and a direction. Within an expert, columns
    are ranked by how much their magnitude changed, and by how much their direction did. Both ranks become scores
    by a softmax over the experts; a rank above `above_average` times its expert's mean rank gets
    `important_score` instead. The merged task vector is Σ_t ½ (magnitude score + direction score) τ_t. Other
    shapes are scored by |τ_t| in place of ranks.
    """

    spec = task_vector_spec(
        "widen",
        "WIDEN",
        "https://arxiv.org/abs/2408.03092",
        shared("above_average", Annotated[float, Field(ge=0, allow_inf_nan=False)], 1.0),
        shared("important_score", Finite, 1.0),
    )

    def combine(self, weight: ModelWeight, parameters: Mapping[str, Any]) -> Tensor:
        """See the class."""
        limits = parameters["above_average"], parameters["important_score"]
        if not weight.is_matrix:
            flat = weight.taus.flatten(1)
            merged = (flat * importance(flat.abs(), *limits)).sum(dim=0)
            return merged.view(weight.base.shape)
        rows = any(name in weight.name for name in _EMBEDDINGS)
        base = weight.base.to(torch.float32)
        changes = [changes_of_columns(base, tau, 1 if rows else 0) for tau in weight.taus]
        scores = [importance(ranks(torch.stack(c)), *limits) for c in zip(*changes, strict=True)]
        score = (scores[0] + scores[1]) / 2
        merged = torch.zeros_like(base)
        for tau, of_expert in zip(weight.taus, score, strict=True):
            merged.addcmul_(tau, of_expert[:, None] if rows else of_expert)
        return merged


def changes_of_columns(base: Tensor, tau: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Measure how much the magnitude and the direction of each column changed.

    Args:
        base: `[m, n]` float32.
        tau: `[m, n]` float32.
        dim: along which a column lies.

    Returns:
        |‖b + τ‖ − ‖b‖|, and 1 − cos(b + τ, b) as ½ ‖b/‖b‖ − (b + τ)/‖b + τ‖‖², which small changes do not round to 0.
    """
    before = base.norm(dim=dim, keepdim=True)
    expert = base + tau
    after = expert.norm(dim=dim, keepdim=True)
    magnitude = (after - before).abs()
    turned = expert.div_(after.clamp(min=_TINY)).sub_(base / before.clamp(min=_TINY))
    return magnitude.squeeze(dim), turned.square_().sum(dim=dim) / 2


def ranks(changes: Tensor) -> Tensor:
    """The share of the columns of the same expert that changed less, `[experts, columns]`."""
    count = changes.shape[1]
    order = torch.argsort(changes, dim=1, stable=True)
    places = torch.arange(count, device=changes.device, dtype=torch.float32) / count
    return torch.zeros_like(changes).scatter_(1, order, places.expand_as(order))


def importance(significance: Tensor, above_average: float, important_score: float) -> Tensor:
    """Scores of all experts for each column.

    Args:
        significance: `[experts, columns]` float32.
        above_average: how many times the mean of its expert makes a column important.
        important_score: what an important column gets.

    Returns:
        `[experts, columns]`.
    """
    average = significance.mean(dim=1, keepdim=True)
    scores = torch.softmax(significance, dim=0)
    return scores.masked_fill_(significance > average * above_average, important_score)
