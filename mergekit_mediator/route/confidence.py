"""How sure a router may be: temperature, threshold and calibration error from held-out scores."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

_ACCEPTED_ERROR = 0.01  # of the prompts that `auto` gives to one expert alone


def fit_temperature(scores: Tensor, truth: Tensor) -> float:
    """The temperature of the softmax that makes held-out truths likeliest.

    Truths are smoothed by 1/(n + 2), as Platt (1999) does, or perfect scores would have none.

    Args:
        scores: `[n, n_experts]`.
        truth: `[n]` int64.
    """
    smooth = 1 / (len(scores) + 2)
    target = torch.full_like(scores, smooth / (scores.shape[1] - 1))
    target[torch.arange(len(scores)), truth] = 1 - smooth

    def loss(log_temperature: float) -> float:
        return -float(((scores / math.exp(log_temperature)).log_softmax(dim=1) * target).sum())

    scale = float(scores.std().clamp_min(1e-12))
    return math.exp(_minimum(loss, math.log(scale) - 8, math.log(scale) + 5))


def expected_calibration_error(probabilities: Tensor, truth: Tensor, bins: int = 15) -> float:
    """`Σ_b n_b/n |accuracy_b − confidence_b|` over equal bins of confidence (Guo et al. 2017)."""
    confidence, choice = probabilities.max(dim=1)
    right = (choice == truth).to(confidence.dtype)
    index = (confidence * bins).long().clamp_max(bins - 1)
    gap = torch.zeros(bins, dtype=confidence.dtype).index_add_(0, index, right - confidence)
    return float(gap.abs().sum() / len(truth))


def fit_entropy_threshold(probabilities: Tensor, truth: Tensor) -> float:
    """The largest normalised entropy below which at most 1% of held-out prompts go wrong."""
    entropy = torch.special.entr(probabilities).sum(dim=1) / math.log(probabilities.shape[1])
    order = entropy.argsort(stable=True)
    wrong = (probabilities.argmax(dim=1) != truth)[order].double().cumsum(dim=0)
    fine = wrong <= _ACCEPTED_ERROR * torch.arange(1, len(truth) + 1)
    if fine.all():
        return 1.0
    last = fine.nonzero()
    return float(entropy[order[last[-1, 0]]]) if len(last) else 0.0


def _minimum(function: Callable[[float], float], low: float, high: float) -> float:
    """Golden section search for the minimum of a function with one valley."""
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if function(left) < function(right):
            high = right
        else:
            low = left
    return (low + high) / 2
