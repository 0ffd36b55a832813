"""Fit a router to features of a few prompts per expert, and measure it on prompts held out.

Users ask in other words than calibration prompts do. So each expert's prompts are split into four
parts of like prompts, not at random, and each part is judged by a router fitted to the other three:
temperature, thresholds and figures speak for wordings that the router has not seen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from mergekit_mediator.errors import RoutingError
from mergekit_mediator.models.prompt_files import MIN_PROMPTS
from mergekit_mediator.route.calibrated import (
    CalibratedRouter,
    Head,
    Kind,
    out_of_distribution,
    standardized,
)
from mergekit_mediator.route.calibrated_file import MOST_PROMPTS
from mergekit_mediator.route.confidence import (
    expected_calibration_error,
    fit_entropy_threshold,
    fit_temperature,
)
from mergekit_mediator.route.heads import fit_heads

_OOD_QUANTILE = 0.85  # of held-out prompts; chosen on tasks that the benchmark does not report
_CONFUSED = 0.25  # fraction of an expert's held-out prompts given to another: worth a warning


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
    background: Tensor | None = None,
    seed: int = 0,
) -> Calibration:
    """Fit a router to the features of each expert's prompts.

    Args:
        features: by expert, `[n_prompts, d]`, at least 5 each; 20 are enough to work.
        kind, layers, tokens: what the features are, see `CalibratedRouter`.
        head: `ridge`: least squares on class membership; `mahalanobis`: the nearest class mean in
            the shrunk covariance within classes; `prototype`: the same with no covariance.
        background: `[m, d]`, of requests that belong to no expert; none if not given.
        seed: of the order in which prompts are dealt to parts where they are alike; the same seed
            gives the same bytes.

    Raises:
        RoutingError: one expert only, too few prompts or too many, features that are not finite or of
            different widths, or an unknown head.
    """
    if head not in get_args(Head):
        raise RoutingError(f"router head must be one of {', '.join(get_args(Head))}, got {head!r}")
    features = {name: _checked(name, x) for name, x in features.items()}
    if len(features) < 2:
        raise RoutingError(
            f"a router needs prompts of at least two experts, got {', '.join(features) or 'none'}"
        )
    prompts = sum(map(len, features.values()))
    if prompts > MOST_PROMPTS:
        raise RoutingError(f"a router is fitted to at most {MOST_PROMPTS} prompts, got {prompts}")
    widths = {x.shape[1] for x in features.values()}
    if len(widths) > 1:
        raise RoutingError(f"features of different widths {sorted(widths)} cannot be compared")
    if background is None:
        background = torch.zeros(0, *widths)
    router = fit_heads(features, kind, head, layers, seed, background)
    scores, fits, distances, truth = _held_out(router)
    numbers = dict(router.numbers)
    for key, values in (("fit", fits), ("distance", distances)):
        numbers[f"{key}_mean"] = float(values.mean())
        numbers[f"{key}_deviation"] = float(values.std().clamp_min(1e-6))
    ood = out_of_distribution(fits, distances, numbers)
    numbers["ood_threshold"] = float(ood.quantile(_OOD_QUANTILE))
    numbers["temperature"] = fit_temperature(scores, truth)
    probabilities = (scores / numbers["temperature"]).softmax(dim=1)
    numbers["entropy_threshold"] = fit_entropy_threshold(probabilities, truth)
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
        background=router.background,
        seed=router.seed,
    )


def _checked(name: str, features: Tensor) -> Tensor:
    if features.ndim != 2 or len(features) < MIN_PROMPTS:
        raise RoutingError(
            f"expert {name!r}: features [prompts, d] of at least {MIN_PROMPTS} prompts required, "
            f"got {list(features.shape)}"
        )
    if not torch.isfinite(features).all():
        raise RoutingError(f"expert {name!r}: features that are not finite")
    return features.detach().to("cpu", torch.float32).contiguous()


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
        fitted = fit_heads(
            rest, router.kind, router.head, router.layers, router.seed, router.background
        )
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


def _warnings(names: Sequence[str], confusion: Tensor) -> tuple[str, ...]:
    share = confusion.double() / confusion.sum(dim=1, keepdim=True)
    return tuple(
        f"{share[i, j]:.0%} of the held-out prompts of {names[i]!r} are taken for {names[j]!r}: is "
        "their data the same, or too little?"
        for i in range(len(names))
        for j in range(len(names))
        if i != j and share[i, j] >= _CONFUSED
    )
