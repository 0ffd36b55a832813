"""The confidence of a router: temperature, threshold and calibration error from held-out scores."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# The fraction of wrong choices among the held-out prompts that `auto` gives to one expert alone.
_ACCEPTED_ERROR = 0.01


def fit_temperature(scores: Tensor, truth: Tensor) -> float:
    """Find the temperature of the softmax that makes the true experts likeliest.

    Targets are smoothed by 1/(n + 2), after Platt (1999): otherwise perfect scores would have no best
    temperature.

    Args:
        scores: `[n, n_experts]`, those of held-out prompts.
        truth: `[n]` int64, the index of each prompt's expert.

    Returns:
        The temperature, in units of the scores.
    """
    smooth = 1 / (len(scores) + 2)
    target = torch.full_like(scores, smooth / (scores.shape[1] - 1))
    target[torch.arange(len(scores)), truth] = 1 - smooth

    def loss(log_temperature: float) -> float:
        return -float(((scores / math.exp(log_temperature)).log_softmax(dim=1) * target).sum())

    scale = float(scores.std().clamp_min(1e-12))
    return math.exp(_minimum(loss, math.log(scale) - 8, math.log(scale) + 5))


def reliability(confidence: Tensor, hits: Tensor, bins: int = 15) -> list[tuple[int, float, float]]:
    """Compare confidence with accuracy, in equal bins of confidence.

    Args:
        confidence: `[n]`, the probability of the likeliest expert, from 0 to 1.
        hits: `[n]` bool, whether that expert is the true one.
        bins: the number of bins.

    Returns:
        For each bin that is not empty: the number of prompts, their mean confidence and their accuracy.
    """
    index = (confidence * bins).long().clamp_max(bins - 1)
    members = (index == b for b in sorted(set(index.tolist())))
    return [
        (int(m.sum()), float(confidence[m].mean()), float(hits[m].double().mean())) for m in members
    ]


def expected_calibration_error(probabilities: Tensor, truth: Tensor, bins: int = 15) -> float:
    """Compute `Σ_b n_b/n |accuracy_b − confidence_b|` over equal bins of confidence (Guo et al. 2017).

    Args:
        probabilities: `[n, n_experts]`.
        truth: `[n]` int64, the index of each prompt's expert.
        bins: the number of bins.

    Returns:
        The error, from 0 to 1.
    """
    confidence, choice = probabilities.max(dim=1)
    rows = reliability(confidence, choice == truth, bins)
    return sum(n * abs(accuracy - mean) for n, mean, accuracy in rows) / len(truth)


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Compute how often an outsider's score is above an insider's: the area under the ROC curve.

    Args:
        inside: `[n]`, the scores of requests inside the distribution.
        outside: `[m]`, those of requests outside it.

    Returns:
        A fraction from 0 to 1, in which ties count half; 0.5 is chance.
    """
    above = (outside[:, None] > inside).double() + (outside[:, None] == inside).double() / 2
    return float(above.mean())


def fit_entropy_threshold(probabilities: Tensor, truth: Tensor) -> float:
    """Find the largest normalised entropy below which the router errs on at most 1% of held-out prompts.

    Args:
        probabilities: `[n, n_experts]`.
        truth: `[n]` int64, the index of each prompt's expert.

    Returns:
        A fraction of log(n_experts), from 0 to 1.
    """
    entropy = torch.special.entr(probabilities).sum(dim=1) / math.log(probabilities.shape[1])
    order = entropy.argsort(stable=True)
    errors = (probabilities.argmax(dim=1) != truth)[order].double().cumsum(dim=0)
    accepted = errors <= _ACCEPTED_ERROR * torch.arange(1, len(truth) + 1)
    if accepted.all():
        return 1.0
    places = accepted.nonzero()
    return float(entropy[order[places[-1, 0]]]) if len(places) else 0.0


def _minimum(function: Callable[[float], float], low: float, high: float) -> float:
    """Find the minimum of a function with one valley by golden section search."""
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if function(left) < function(right):
            high = right
        else:
            low = left
    return (low + high) / 2
