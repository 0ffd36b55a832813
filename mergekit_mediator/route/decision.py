"""Scores of a request -> which experts, how sure the router is, and how far the request is from the known.

A router returns a `RoutingDecision`; `apply_policy` turns it into the mixture of each request. This file knows
tensors only, neither prompts nor models.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mergekit_mediator.errors import RoutingError

Policy = Literal["hard", "soft", "auto"]
OodAction = Literal["blend", "dense", "fallback", "refuse"]
Unsure = Literal["blend", "dense"]
# A mixture whose weights sum to less is replaced by the dense expert alone.
_NEGLIGIBLE = 0.01


class Thresholds(NamedTuple):
    """The answers of a router to the doubts about a request.

    Attributes:
        entropy: the normalised entropy from which on it is not sure; None if it has no threshold.
        ood: the out-of-distribution score above which a request is far from the known; None likewise.
        unsure: what answers where it is not sure: a blend, or the dense expert where that is a good merge, of which a
            blend of all experts would be nothing but the mean.
    """

    entropy: float | None
    ood: float | None
    unsure: Unsure = "blend"


@dataclass(frozen=True)
class RoutingDecision:
    """A router's probabilities of the experts for a batch of requests.

    Attributes:
        weights: `[batch, n_experts]` float32, the probability of each expert; rows sum to 1.
        entropy: `[batch]` float32, the entropy of each row of `weights`, in nats.
        ood: `[batch]` float32, the out-of-distribution score: the distance from all requests that the router
            knows, higher is farther. NaN if the router cannot tell.
        experts: the experts' names, in the order of the columns.
    """

    weights: Tensor
    entropy: Tensor
    ood: Tensor
    experts: tuple[str, ...]

    @property
    def normalized_entropy(self) -> Tensor:
        """`[batch]` float32 from 0 to 1: the entropy divided by log(n_experts); 0 for one expert."""
        if len(self.experts) < 2:
            return torch.zeros_like(self.entropy)
        return self.entropy / math.log(len(self.experts))


def decide_from_scores(
    scores: Tensor,
    experts: Sequence[str],
    temperature: float = 1.0,
    ood: Tensor | None = None,
) -> RoutingDecision:
    """Make a decision from scores: `p = softmax(scores / temperature)`.

    Args:
        scores: `[batch, n_experts]`, any float dtype, higher is better.
        experts: the experts' names, in the order of the columns.
        temperature: in units of the scores.
        ood: `[batch]`, the out-of-distribution scores; None for NaN everywhere.

    Raises:
        RoutingError: the scores have another shape or are not finite, or the temperature is not positive.
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
    entropy = (weights * logp).sum(dim=1).abs()  # -0.0 would be shown as negative
    return RoutingDecision(weights, entropy, ood, tuple(experts))


def for_experts(decision: RoutingDecision, experts: Sequence[str]) -> RoutingDecision:
    """Give a decision a column for every expert of an artifact; those that the router does not know get 0.

    Args:
        decision: the decision of a router.
        experts: the names of the artifact's experts, in the order of the columns.
    """
    if decision.experts == tuple(experts):
        return decision
    weights = decision.weights.new_zeros(len(decision.weights), len(experts))
    columns = torch.tensor([experts.index(name) for name in decision.experts])
    weights[:, columns.to(weights.device)] = decision.weights
    return replace(decision, weights=weights, experts=tuple(experts))


def apply_policy(
    decision: RoutingDecision,
    policy: Policy = "auto",
    entropy_threshold: float = 0.5,
    *,
    unsure: Unsure = "blend",
    ood_threshold: float | None = None,
    ood_action: OodAction = "blend",
    fallback: str | None = None,
) -> Tensor:
    """Choose the mixture of each request.

    Args:
        decision: the router's decision.
        policy: `hard` takes the likeliest expert alone, `soft` every expert by its probability. `auto` is
            `hard` if the normalised entropy is below `entropy_threshold`, otherwise as `unsure` says.
        entropy_threshold: a fraction of log(n_experts), from 0 to 1.
        unsure: of `auto`: `blend` is `soft`, and `dense` a row of zeros: the dense expert alone. With `dense`, no
            `ood_action` blends what the policy does not.
        ood_threshold: a request whose `ood` is above it gets `ood_action` instead of `policy`. A NaN is never
            above it. None for no such requests.
        ood_action: `blend` is `soft` times `exp(-(ood - ood_threshold)² / 2)`: the farther the request, the
            more it is the dense expert that answers. `dense` is a row of zeros: the dense expert alone.
            `fallback` is one expert alone. `refuse` raises.
        fallback: the name of the expert for `fallback`.

    Returns:
        `[batch, n_experts]` float32.

    Raises:
        RoutingError: `policy`, `ood_action` or `fallback` is unknown, `entropy_threshold` is out of range, or a
            request is refused.
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
    otherwise = torch.zeros_like(soft) if policy == "auto" and unsure == "dense" else soft
    weights = torch.where(sure[:, None], hard, otherwise)
    if ood_threshold is None:
        return weights
    far = decision.ood > ood_threshold
    if ood_action == "refuse" and far.any():
        row = int(far.nonzero()[0])
        raise RoutingError(
            f"request {row} is out of distribution: score {float(decision.ood[row]):.3g} is above "
            f"the calibrated {ood_threshold:.3g}: set ood_action to blend, dense or fallback to answer it"
        )
    nearness = (-(decision.ood - ood_threshold).clamp_min(0).square() / 2).exp()
    blended = weights if unsure == "dense" else soft
    ood_weights = blended * torch.where(nearness < _NEGLIGIBLE, 0, nearness)[:, None]
    if ood_action == "dense":
        ood_weights = torch.zeros_like(soft)
    elif ood_action == "fallback":
        if fallback not in decision.experts:
            names = ", ".join(decision.experts)
            raise RoutingError(f"fallback must name one of the experts {names}, got {fallback!r}")
        ood_weights = torch.zeros_like(soft)
        ood_weights[:, decision.experts.index(fallback)] = 1.0
    return torch.where(far[:, None], ood_weights, weights)
