"""Scores or features of a request -> which experts, how sure, and how far from everything known.

A router answers with a `RoutingDecision`; `apply_policy` turns it into the mixture that is used.
Tensors only: this file knows neither prompts nor models.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mergekit_mediator.errors import RoutingError

Policy = Literal["hard", "soft", "auto"]
OodAction = Literal["blend", "dense", "fallback", "refuse"]
# Experts that together have less weight than this are not worth putting in place.
_NEGLIGIBLE = 0.01


@dataclass(frozen=True)
class RoutingDecision:
    """What a router thinks of a batch of requests.

    weights: `[batch, n_experts]` float32, the probability of each expert; rows sum to 1.
    entropy: `[batch]` float32, of each row of `weights`, in nats.
    ood: `[batch]` float32, distance from everything the router knows, higher is farther;
        NaN where the router cannot tell.
    experts: the experts' names, in the order of the columns.
    """

    weights: Tensor
    entropy: Tensor
    ood: Tensor
    experts: tuple[str, ...]

    @property
    def normalized_entropy(self) -> Tensor:
        """`[batch]` float32 in [0, 1]: entropy divided by log(n_experts); 0 for one expert."""
        if len(self.experts) < 2:
            return torch.zeros_like(self.entropy)
        return self.entropy / math.log(len(self.experts))


def decide_from_scores(
    scores: Tensor,
    experts: Sequence[str],
    temperature: float = 1.0,
    ood: Tensor | None = None,
) -> RoutingDecision:
    """Softmax of scores, `p = softmax(scores / temperature)`.

    scores: `[batch, n_experts]`, higher is better, in any unit that `temperature` is in.
    ood: `[batch]`; NaN everywhere if not given.

    Raises:
        RoutingError: scores of another shape or not finite, or a temperature that is not positive.
    """
    if scores.ndim != 2 or scores.shape[1] != len(experts) or not experts:
        raise RoutingError(
            f"router scores must be [batch, {len(experts)} experts], got {list(scores.shape)}"
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise RoutingError(f"router temperature must be a positive number, got {temperature}")
    scores = scores.detach().to(torch.float32)
    finite = torch.isfinite(scores).all(dim=1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise RoutingError(f"router scores of request {row} are not finite: {scores[row].tolist()}")
    logp = (scores / temperature).log_softmax(dim=1)
    weights = logp.exp()
    if ood is None:
        ood = torch.full((len(scores),), math.nan, device=scores.device)
    return RoutingDecision(weights, -(weights * logp).sum(dim=1), ood, tuple(experts))


def apply_policy(
    decision: RoutingDecision,
    policy: Policy = "auto",
    entropy_threshold: float = 0.5,
    *,
    ood_threshold: float | None = None,
    ood_action: OodAction = "blend",
    fallback: str | None = None,
) -> Tensor:
    """The mixture to use for each request, `[batch, n_experts]` float32.

    policy: `hard` is the likeliest expert alone, `soft` every expert by its probability, `auto`
        the first where the normalised entropy is below `entropy_threshold`, else the second.
    ood_threshold: requests whose `ood` is above it get `ood_action` instead: `blend` (as `soft`, times
        `exp(-(ood - ood_threshold)² / 2)`: the farther a request, the less of the experts and the more
        of the dense expert, their mean), `dense` (a row of zeros: the dense expert alone), `fallback`
        (the expert of that name alone) or `refuse`. A NaN score is never above it.

    Raises:
        RoutingError: an unknown policy, action or fallback, a threshold of entropy out of range, or requests
            that are refused.
    """
    if policy not in get_args(Policy):
        raise RoutingError(f"policy must be one of {', '.join(get_args(Policy))}, got {policy!r}")
    if not 0 <= entropy_threshold <= 1:
        raise RoutingError(
            f"entropy_threshold must be a fraction of log(experts), 0 to 1, got {entropy_threshold!r}"
        )
    if ood_action not in get_args(OodAction):
        names = ", ".join(get_args(OodAction))
        raise RoutingError(f"out-of-distribution action must be one of {names}, got {ood_action!r}")
    soft = decision.weights
    hard = torch.zeros_like(soft).scatter(1, soft.argmax(dim=1, keepdim=True), 1.0)
    sure = {
        "hard": torch.ones_like(decision.entropy, dtype=torch.bool),
        "soft": torch.zeros_like(decision.entropy, dtype=torch.bool),
        "auto": decision.normalized_entropy < entropy_threshold,
    }[policy]
    weights = torch.where(sure[:, None], hard, soft)
    if ood_threshold is None:
        return weights
    far = decision.ood > ood_threshold
    if ood_action == "refuse" and far.any():
        row = int(far.nonzero()[0])
        raise RoutingError(
            f"request {row} is out of distribution: score {float(decision.ood[row]):.3g} is above "
            f"the calibrated {ood_threshold:.3g}; choose another action to answer it all the same"
        )
    near = (-(decision.ood - ood_threshold).clamp_min(0).square() / 2).exp()
    instead = soft * torch.where(near < _NEGLIGIBLE, 0, near)[:, None]
    if ood_action == "dense":
        instead = torch.zeros_like(soft)
    elif ood_action == "fallback":
        if fallback not in decision.experts:
            names = ", ".join(decision.experts)
            raise RoutingError(f"fallback must name one of the experts {names}, got {fallback!r}")
        instead = torch.zeros_like(soft)
        instead[:, decision.experts.index(fallback)] = 1.0
    return torch.where(far[:, None], instead, weights)
