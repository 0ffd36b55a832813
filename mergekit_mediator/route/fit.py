"""The fit of a router to the features of a few prompts per expert, and its figures on held-out prompts.

Users ask in other words than calibration prompts do. So each expert's prompts are split into four parts of
similar prompts, not at random, and a router fitted to three parts judges the fourth. Temperature, thresholds
and figures thus hold for wordings that the router has not seen.
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
    auroc,
    expected_calibration_error,
    fit_entropy_threshold,
    fit_temperature,
    reliability,
)
from mergekit_mediator.route.heads import fit_heads

# The quantile of held-out prompts at the out-of-distribution threshold; chosen on the tasks of
# benchmarks/router_development.py. The column `flagged` of benchmarks/results/router.json shows its effect.
_OOD_QUANTILE = 0.85
# The fraction of an expert's held-out prompts that a router gives to another expert, from which it warns.
_CONFUSION_TO_WARN = 0.25


@dataclass(frozen=True)
class Calibration:
    """A router with its figures and warnings.

    Attributes:
        router: the router, fitted to all prompts.
        figures: JSON values for the manifest. On held-out prompts: `accuracy` (0 to 1), `ece` (expected
            calibration error in 15 bins of confidence), `reliability` (prompts, mean confidence and accuracy
            of each bin) and `confusion` (prompts by true expert, then by chosen expert). On these and on the
            `ood_requests` requests of the background, held out too: `ood_auroc`, how well the out-of-distribution
            score tells the two apart (0 to 1; None without background). Also `temperature`, `entropy_threshold`,
            `ood_threshold`, `prompts` (their number by expert) and the arguments of the fit.
        warnings: one readable line for each.
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
        features: by expert, `[n_prompts, d]`, at least 5 prompts each; docs/results/routers.md uses 20.
        kind: the features, see `CalibratedRouter`.
        head: `ridge` is least squares on class membership. `mahalanobis` is the nearest class mean in the
            shrunk covariance within classes. `prototype` is the nearest class mean without covariance.
        layers: see `CalibratedRouter`.
        tokens: see `CalibratedRouter`; None for none.
        background: `[m, d]`, the features of requests that belong to no expert; None for none.
        seed: orders prompts that are alike before they are split. The same seed gives the same bytes.

    Raises:
        RoutingError: there are fewer than two experts, too few or too many prompts, features that are not
            finite or differ in width, or the head is unknown.
    """
    if head not in get_args(Head):
        raise RoutingError(f"router head must be one of {', '.join(get_args(Head))}, got {head!r}")
    features = {name: _check_features(name, x) for name, x in features.items()}
    if len(features) < 2:
        raise RoutingError(
            f"a router needs prompts of at least two experts, got {', '.join(features) or 'none'}"
        )
    prompts = sum(map(len, features.values()))
    if prompts > MOST_PROMPTS:
        raise RoutingError(
            f"all experts together may have at most {MOST_PROMPTS} prompts, got {prompts}: give fewer"
        )
    widths = {x.shape[1] for x in features.values()}
    if len(widths) > 1:
        raise RoutingError(
            f"features of one width required, got the widths {sorted(widths)}: calibrate all experts with "
            "the same model"
        )
    if background is None:
        background = torch.zeros(0, *widths)
    router = fit_heads(features, kind, head, layers, seed, background)
    parts = _quartered(router)
    scores, fits, distances, truth = _measure_held_out(router, parts)
    numbers = dict(router.numbers)
    for key, values in (("fit", fits), ("distance", distances)):
        numbers[f"{key}_mean"] = float(values.mean())
        numbers[f"{key}_deviation"] = float(values.std().clamp_min(1e-6))
    ood = out_of_distribution(fits, distances, numbers)
    numbers["ood_threshold"] = float(ood.quantile(_OOD_QUANTILE))
    numbers["temperature"] = fit_temperature(scores, truth)
    probabilities = (scores / numbers["temperature"]).softmax(dim=1)
    numbers["entropy_threshold"] = fit_entropy_threshold(probabilities, truth)
    confidence, choice = probabilities.max(dim=1)
    confusion = torch.zeros(len(features), len(features), dtype=torch.int64)
    confusion.index_put_((truth, choice), torch.tensor(1), accumulate=True)
    names = list(features)
    figures = {
        "features": kind,
        "head": head,
        "layers": list(layers),
        "seed": seed,
        "accuracy": float((choice == truth).double().mean()),
        "ece": expected_calibration_error(probabilities, truth),
        "reliability": [list(row) for row in reliability(confidence, choice == truth)],
        "experts": names,
        "confusion": confusion.tolist(),
        "ood_auroc": _held_out_auroc(router, parts, numbers),
        "ood_requests": len(background),
        "prompts": {name: len(x) for name, x in features.items()},
        **{k: numbers[k] for k in ("temperature", "entropy_threshold", "ood_threshold")},
    }
    tokens = router.tokens if tokens is None else tokens
    router = replace(router, tokens=tokens, numbers=numbers)
    return Calibration(router, figures, _warnings(names, confusion))


def add(router: CalibratedRouter, name: str, features: Tensor) -> Calibration:
    """Fit again with one more expert, or with new prompts of an expert.

    The other experts' prompts are not needed, as the router holds their features.

    Args:
        router: the present router. Its `tokens` remain.
        name: the expert.
        features: `[n_prompts, d]`, those of the expert's prompts.

    Raises:
        RoutingError: see `fit`.
    """
    return _refit(router, {**router.features, name: features})


def remove(router: CalibratedRouter, name: str) -> Calibration:
    """Fit again without an expert.

    Raises:
        RoutingError: the router has no expert of that name, or fewer than two experts would remain.
    """
    if name not in router.features:
        raise RoutingError(f"the router has no expert {name!r}, only {', '.join(router.experts)}")
    return _refit(router, {k: x for k, x in router.features.items() if k != name})


def _refit(router: CalibratedRouter, features: Mapping[str, Tensor]) -> Calibration:
    return fit(
        features,
        router.kind,
        head=router.head,
        layers=router.layers,
        tokens=router.tokens,
        background=router.background,
        seed=router.seed,
    )


def _check_features(name: str, features: Tensor) -> Tensor:
    """Return features as a contiguous float32 tensor on the CPU, if they can be used.

    Raises:
        RoutingError: they have another shape, are too few or are not finite.
    """
    if features.ndim != 2 or len(features) < MIN_PROMPTS:
        raise RoutingError(
            f"expert {name!r}: features [prompts, d] of at least {MIN_PROMPTS} prompts required, "
            f"got {list(features.shape)}"
        )
    if not torch.isfinite(features).all():
        raise RoutingError(
            f"expert {name!r}: finite features required, got NaN or infinite ones: check the weights of the "
            "dense expert"
        )
    return features.detach().to("cpu", torch.float32).contiguous()


def _quartered(router: CalibratedRouter) -> dict[str, list[Tensor]]:
    """Split the features of each expert's prompts into four parts of similar prompts."""
    blocks = len(router.layers) or 1
    return {
        name: _quarters(
            x, standardized(x, router.center, router.scale, blocks).double(), router.seed
        )
        for name, x in router.features.items()
    }


def _without(
    router: CalibratedRouter, parts: Mapping[str, list[Tensor]], part: int, background: Tensor
) -> CalibratedRouter:
    """Fit a router like this one to all parts but one."""
    rest = {n: torch.cat([*p[:part], *p[part + 1 :]]) for n, p in parts.items()}
    return fit_heads(rest, router.kind, router.head, router.layers, router.seed, background)


def _measure_held_out(
    router: CalibratedRouter, parts: Mapping[str, list[Tensor]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute scores `[n, n_experts]`, both misfits `[n]` and true experts `[n]` of all prompts, held out in turn."""
    measures, truth = [], []
    for part in range(4):
        part_router = _without(router, parts, part, router.background)
        for index, name in enumerate(parts):
            measures.append(part_router.measure(parts[name][part]))
            truth.append(torch.full((len(parts[name][part]),), index))
    scores, fits, distances = (torch.cat(values) for values in zip(*measures, strict=True))
    return scores, fits, distances, torch.cat(truth)


def _held_out_auroc(
    router: CalibratedRouter, parts: Mapping[str, list[Tensor]], numbers: Mapping[str, float]
) -> float | None:
    """Compute how well the out-of-distribution score tells prompts from general requests, both held out in turn.

    Every fourth request of the background is left out of a fit, so that none that is judged has taught it. None
    without at least four of them.
    """
    if len(router.background) < 4:
        return None
    inside: list[Tensor] = []
    outside: list[Tensor] = []
    for part in range(4):
        is_held_out = torch.arange(len(router.background)) % 4 == part
        part_router = _without(router, parts, part, router.background[~is_held_out])
        prompts = torch.cat([quarters[part] for quarters in parts.values()])
        for features, scores in ((prompts, inside), (router.background[is_held_out], outside)):
            _, fit_misfit, distance = part_router.measure(features)
            scores.append(out_of_distribution(fit_misfit, distance, numbers))
    return auroc(torch.cat(inside), torch.cat(outside))


def _quarters(features: Tensor, x: Tensor, seed: int) -> list[Tensor]:
    """Split features `[n, d]` into four parts of similar prompts.

    The prompts are halved along the direction in which the standardized features `x` vary most, and each half
    likewise.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return [features[quarter] for half in _halves(x, order) for quarter in _halves(x, half)]


def _halves(x: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    z = x[rows] - x[rows].mean(dim=0)
    coordinates = torch.linalg.eigh(z @ z.T).eigenvectors[:, -1]
    return rows[coordinates.argsort(stable=True)].tensor_split(2)


def _warnings(names: Sequence[str], confusion: Tensor) -> tuple[str, ...]:
    share = confusion.double() / confusion.sum(dim=1, keepdim=True)
    return tuple(
        f"the router gives {share[i, j]:.0%} of the held-out prompts of {names[i]!r} to {names[j]!r}: give "
        "more prompts, and check that the two experts have different ones"
        for i in range(len(names))
        for j in range(len(names))
        if i != j and share[i, j] >= _CONFUSION_TO_WARN
    )
