"""Fit a router to features of a few prompts per expert, and measure it on prompts held out.

Users ask in other words than calibration prompts do. So each expert's prompts are split into four
parts of like prompts, not at random, and each part is judged by a router fitted to the other three:
temperature, thresholds and figures speak for wordings that the router has not seen.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from mergekit_mediator.calibrated import (
    CalibratedRouter,
    Head,
    Kind,
    out_of_distribution,
    standardized,
)
from mergekit_mediator.calibration_data import MIN_PROMPTS
from mergekit_mediator.errors import RoutingError

_RIDGE = 0.3  # of the mean squared norm of centred features; this and the next two were chosen
_SHRINKAGE = 0.3  # of the covariance within classes towards a multiple of the identity; on tasks
_OOD_QUANTILE = 0.85  # of held-out prompts; that the benchmark does not report
_CONFUSED = 0.25  # fraction of an expert's held-out prompts given to another: worth a warning
_ACCEPTED_ERROR = 0.01  # of the prompts that `auto` gives to one expert alone


@dataclass(frozen=True)
class Calibration:
    """A router and what is known of it.

    figures: JSON values for the manifest: `accuracy`, `ece`, `confusion` (rows are the truth),
        `temperature`, `entropy_threshold`, `ood_threshold`, `prompts` by expert, and how it was
        made. `ece` is the expected calibration error in 15 bins of confidence.
    warnings: readable lines.
    """

    router: CalibratedRouter
    figures: dict[str, Any]
    warnings: tuple[str, ...]


def fit(
    features: Mapping[str, Tensor],
    kind: Kind,
    *,
    head: Head = "ridge",
    layers: tuple[int, ...] = (),
    tokens: Tensor | None = None,
    seed: int = 0,
) -> Calibration:
    """Fit a router to the features of each expert's prompts.

    Args:
        features: by expert, `[n_prompts, d]`, at least 5 each; 20 are enough to work.
        kind, layers, tokens: what the features are, see `CalibratedRouter`.
        head: `ridge`: least squares on class membership; `mahalanobis`: the nearest class mean in
            the shrunk covariance within classes; `prototype`: the same with no covariance.
        seed: of the order in which prompts are dealt to parts where they are alike; the same seed
            gives the same bytes.

    Raises:
        RoutingError: one expert only, too few prompts, features that are not finite or of
            different widths, or an unknown head.
    """
    if head not in get_args(Head):
        raise RoutingError(f"router head must be one of {', '.join(get_args(Head))}, got {head!r}")
    features = {name: _checked(name, x) for name, x in features.items()}
    if len(features) < 2:
        raise RoutingError(
            f"a router needs prompts of at least two experts, got {', '.join(features) or 'none'}"
        )
    widths = {x.shape[1] for x in features.values()}
    if len(widths) > 1:
        raise RoutingError(f"features of different widths {sorted(widths)} cannot be compared")
    router = _fit(features, kind, head, layers, seed)
    scores, fits, distances, truth = _held_out(router)
    numbers = dict(router.numbers)
    for key, values in (("fit", fits), ("distance", distances)):
        numbers[f"{key}_mean"] = float(values.mean())
        numbers[f"{key}_deviation"] = float(values.std().clamp_min(1e-6))
    ood = out_of_distribution(fits, distances, numbers)
    numbers["ood_threshold"] = float(ood.quantile(_OOD_QUANTILE))
    numbers["temperature"] = fit_temperature(scores, truth)
    probabilities = (scores / numbers["temperature"]).softmax(dim=1)
    numbers["entropy_threshold"] = _entropy_threshold(probabilities, truth)
    confusion = torch.zeros(len(features), len(features), dtype=torch.int64)
    confusion.index_put_((truth, scores.argmax(dim=1)), torch.tensor(1), accumulate=True)
    names = list(features)
    figures = {
        "features": kind,
        "head": head,
        "layers": list(layers),
        "seed": seed,
        "accuracy": float((scores.argmax(dim=1) == truth).double().mean()),
        "ece": expected_calibration_error(probabilities, truth),
        "experts": names,
        "confusion": confusion.tolist(),
        "prompts": {name: len(x) for name, x in features.items()},
        **{k: numbers[k] for k in ("temperature", "entropy_threshold", "ood_threshold")},
    }
    tokens = router.tokens if tokens is None else tokens
    router = replace(router, tokens=tokens, numbers=numbers)
    return Calibration(router, figures, _warnings(names, confusion))


def add(router: CalibratedRouter, name: str, features: Tensor) -> Calibration:
    """Fit again with one expert more, or with new prompts for one that is there.

    The other experts' prompts are not needed: the router keeps their features. `tokens` stay those
    of the first calibration.
    """
    return _again(router, {**router.features, name: features})


def remove(router: CalibratedRouter, name: str) -> Calibration:
    """Fit again without an expert.

    Raises:
        RoutingError: there is none of that name, or one would be left.
    """
    if name not in router.features:
        raise RoutingError(f"the router knows no expert {name!r}: {', '.join(router.experts)}")
    return _again(router, {k: x for k, x in router.features.items() if k != name})


def _again(router: CalibratedRouter, features: Mapping[str, Tensor]) -> Calibration:
    return fit(
        features,
        router.kind,
        head=router.head,
        layers=router.layers,
        tokens=router.tokens,
        seed=router.seed,
    )


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


def _checked(name: str, features: Tensor) -> Tensor:
    if features.ndim != 2 or len(features) < MIN_PROMPTS:
        raise RoutingError(
            f"expert {name!r}: features [prompts, d] of at least {MIN_PROMPTS} prompts required, "
            f"got {list(features.shape)}"
        )
    if not torch.isfinite(features).all():
        raise RoutingError(f"expert {name!r}: features that are not finite")
    return features.detach().to("cpu", torch.float32).contiguous()


def _fit(
    features: Mapping[str, Tensor],
    kind: Kind,
    head: Head,
    layers: tuple[int, ...],
    seed: int,
) -> CalibratedRouter:
    """Everything but what needs held-out prompts. In float64: sums of many near-equal rows."""
    raw = torch.cat(list(features.values())).double()
    center, scale = raw.mean(dim=0), raw.std(dim=0)
    scale = scale + scale.mean().clamp_min(1e-12)  # or features that hardly vary would be all noise
    x = standardized(raw, center, scale, len(layers) or 1)
    rows = torch.split(x, [len(f) for f in features.values()])
    means = torch.stack([r.mean(dim=0) for r in rows])
    within = torch.cat([r - r.mean(dim=0) for r in rows])
    values, vectors = _principal(within / math.sqrt(len(x)))
    shrinkage = 1.0 if head == "prototype" else _SHRINKAGE
    variance = max(float(values.sum() / x.shape[1]), 1e-12) * shrinkage
    shrunk = values * (1 - shrinkage) + variance
    spread = vectors * (1 / variance - 1 / shrunk).clamp_min(0).sqrt()[:, None]
    near_weight = means / variance - (means @ spread.T) @ spread
    near = near_weight, -(means * near_weight).sum(dim=1) / 2
    truth = torch.repeat_interleave(torch.tensor([len(r) for r in rows]))
    fit = _ridge(x, torch.nn.functional.one_hot(truth, len(rows)).double())
    weight, bias = fit if head == "ridge" else near
    return CalibratedRouter(
        kind=kind,
        layers=layers,
        head=head,
        seed=seed,
        features=features,
        tokens=torch.zeros(0, dtype=torch.int64),
        center=center.float(),
        scale=scale.float(),
        weight=weight.float(),
        bias=bias.float(),
        fit_weight=fit[0].float().clone(),
        fit_bias=fit[1].float().clone(),
        near_weight=near[0].float().clone(),
        near_bias=near[1].float().clone(),
        spread=spread.float(),
        numbers={"variance": variance},
    )


def _principal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[r]` and eigenvectors `[r, d]` of `rows.T @ rows`, but for those that are 0.

    Through `rows @ rows.T` where that is smaller: there are mostly fewer prompts than d.
    """
    wide = len(rows) < rows.shape[1]
    values, vectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    used = values > 1e-10 * values.max().clamp_min(1e-300)
    values, vectors = values[used], vectors[:, used].T
    return values, (vectors @ rows) / values.sqrt()[:, None] if wide else vectors


def _ridge(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Weight `[k, d]` and bias `[k]` of ridge regression, in the dual: n is smaller than d."""
    center, level = x.mean(dim=0), target.mean(dim=0)
    z = x - center
    kernel = z @ z.T
    kernel.diagonal().add_(_RIDGE * kernel.diagonal().mean().clamp_min(1e-12))
    weight = torch.linalg.solve(kernel, target - level).T @ z
    return weight, level - weight @ center


def _held_out(router: CalibratedRouter) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores `[n, n_experts]`, both misfits `[n]` and truths `[n]` of prompts held out."""
    blocks = len(router.layers) or 1
    parts = {
        name: _like_with_like(
            x, standardized(x, router.center, router.scale, blocks).double(), router.seed
        )
        for name, x in router.features.items()
    }
    measured, truth = [], []
    for part in range(4):
        rest = {n: torch.cat([*p[:part], *p[part + 1 :]]) for n, p in parts.items()}
        fitted = _fit(rest, router.kind, router.head, router.layers, router.seed)
        for index, name in enumerate(parts):
            measured.append(fitted.measure(parts[name][part]))
            truth.append(torch.full((len(parts[name][part]),), index))
    scores, fits, distances = (torch.cat(values) for values in zip(*measured, strict=True))
    return scores, fits, distances, torch.cat(truth)


def _like_with_like(features: Tensor, x: Tensor, seed: int) -> list[Tensor]:
    """Features in four parts of like prompts: halved along the direction in which `x` varies most,
    and each half again."""
    mixed = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return [features[quarter] for half in _halves(x, mixed) for quarter in _halves(x, half)]


def _halves(x: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    z = x[rows] - x[rows].mean(dim=0)
    along = torch.linalg.eigh(z @ z.T).eigenvectors[:, -1]
    return rows[along.argsort(stable=True)].tensor_split(2)


def _entropy_threshold(probabilities: Tensor, truth: Tensor) -> float:
    """The largest normalised entropy below which at most 1% of held-out prompts go wrong."""
    entropy = torch.special.entr(probabilities).sum(dim=1) / math.log(probabilities.shape[1])
    order = entropy.argsort(stable=True)
    wrong = (probabilities.argmax(dim=1) != truth)[order].double().cumsum(dim=0)
    fine = wrong <= _ACCEPTED_ERROR * torch.arange(1, len(truth) + 1)
    if fine.all():
        return 1.0
    last = fine.nonzero()
    return float(entropy[order[last[-1, 0]]]) if len(last) else 0.0


def _warnings(names: Sequence[str], confusion: Tensor) -> tuple[str, ...]:
    share = confusion.double() / confusion.sum(dim=1, keepdim=True)
    return tuple(
        f"{share[i, j]:.0%} of the held-out prompts of {names[i]!r} are taken for {names[j]!r}: is "
        "their data the same, or too little?"
        for i in range(len(names))
        for j in range(len(names))
        if i != j and share[i, j] >= _CONFUSED
    )


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
