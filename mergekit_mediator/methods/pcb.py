"""`pcb`: every parameter from the experts to which it matters most, within each and among all."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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

# The part of all magnitudes at either end that is clamped to the rest.
_CLAMPED = 1e-4
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Limits:
    """Figures of all weights, each `[experts, 1]` float32.

    Attributes:
        least, most: magnitudes of task vectors are clamped to these.
        threshold: the smallest score that counts for nothing.
        best: the largest score.
    """

    least: Tensor
    most: Tensor
    threshold: Tensor
    best: Tensor

    def to(self, device: torch.device) -> "Limits":
        """The same on another device."""
        return Limits(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


class Pcb(WholeModelMethod):
    """PCB-Merging: Du et al., "Parameter Competition Balancing for Model Merging" (2024), section 3.

    With n experts and |τ_t|, clamped to the inner part of its distribution and brought to [0, 1], as a_t, the score
    of a parameter is exp(n a_t²) · tanh(τ_t Σ_s τ_s). Of all scores of an expert the `density` that is largest
    counts, brought to [0, 1] as β_t. The merged task vector is Σ_t β_t τ_t / Σ_t β_t, and 0 where no score counts.
    """

    spec = task_vector_spec(
        "pcb",
        "PCB-Merging",
        "https://arxiv.org/abs/2410.02396",
        shared("density", Fraction, 0.1),
    )
    whole = ("density",)

    def measure(self, weights: ModelWeights, parameters: Mapping[str, Any]) -> Limits:
        """The limits of magnitudes and scores over all weights."""
        density = parameters["density"]

        def parts() -> Iterator[Tensor]:
            for weight, _ in weights:
                yield from flat_chunks(weight.taus)

        ends = order_statistics(
            lambda: (part.abs() for part in parts()),
            lambda count: [int(count * _CLAMPED), max(0, int(count * (1 - _CLAMPED) - 1))],
        )
        least, most = ends[:, :1], ends[:, 1:]
        best = order_statistics(
            lambda: (scores(part, least, most) for part in parts()),
            lambda count: [min(count - 1, int(count * (1 - density))), count - 1],
        )
        return Limits(least, most, best[:, :1], best[:, 1:])

    def combine(self, weight: ModelWeight, parameters: Mapping[str, Any]) -> Tensor:
        """See the class."""
        limits = parameters[FIGURES].to(weight.taus.device)
        merged = torch.empty_like(weight.taus[0])
        for out, part in zip(flat_chunks(merged[None]), flat_chunks(weight.taus), strict=True):
            score = scores(part, limits.least, limits.most)
            above = (score - limits.threshold).clamp_(min=0)
            share = above / (limits.best - limits.threshold).clamp(min=_TINY)
            clamped = part.sign() * part.abs().clamp(limits.least, limits.most)
            torch.div((clamped * share).sum(dim=0), share.sum(dim=0).clamp(min=1e-12), out=out[0])
        return merged


def scores(taus: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """Score how much each parameter matters to each expert, and to all.

    Args:
        taus: `[experts, n]` float32.
        least: the limit of magnitudes from below, `[experts, 1]`.
        most: the limit from above, `[experts, 1]`.

    Returns:
        `[experts, n]` float32.
    """
    magnitude = taus.abs().clamp_(least, most).sub_(least).div_((most - least).clamp(min=_TINY))
    within = magnitude.square_().mul_(len(taus)).exp_()
    return within.mul_((taus * taus.sum(dim=0)).tanh_())
