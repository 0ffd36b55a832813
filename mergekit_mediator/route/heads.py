"""The linear heads of a router, fitted to features: which expert, and how far from all of them."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mergekit_mediator.route.calibrated import CalibratedRouter, Head, Kind, standardized

_RIDGE = 0.3  # of the mean squared norm of centred features; this and the next were chosen on tasks
_SHRINKAGE = 0.3  # of the covariance within classes, to the identity; that the benchmark leaves out
_CLAIMED = 0.5  # class membership from which a background request counts as an expert's own


def fit_heads(
    features: Mapping[str, Tensor],
    kind: Kind,
    head: Head,
    layers: tuple[int, ...],
    seed: int,
    background: Tensor,
) -> CalibratedRouter:
    """Everything of a router but what needs held-out prompts. In float64: sums of many near-equal rows.

    Args:
        features: by expert, `[n_prompts, d]` float32.
        kind, layers, head, seed, background: see `CalibratedRouter`.
    """
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
    membership = torch.nn.functional.one_hot(truth, len(rows)).double()
    ridge = _ridge(x, membership)
    weight, bias = ridge if head == "ridge" else near
    fit = _against_background(
        x, membership, ridge, standardized(background.double(), center, scale, len(layers) or 1)
    )
    return CalibratedRouter(
        kind=kind,
        layers=layers,
        head=head,
        seed=seed,
        features=features,
        background=background,
        tokens=torch.zeros(0, dtype=torch.int64),
        center=center.float(),
        scale=scale.float(),
        weight=weight.float(),
        bias=bias.float(),
        fit_weight=fit[0].float(),
        fit_bias=fit[1].float(),
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


def _against_background(
    x: Tensor, membership: Tensor, ridge: tuple[Tensor, Tensor], background: Tensor
) -> tuple[Tensor, Tensor]:
    """Weight `[k, d]` and bias `[k]` of membership in each class less that in the background.

    Args:
        x, membership: `[n, d]`, `[n, k]` of the experts' prompts.
        ridge: what `_ridge` makes of them. Background requests `[m, d]` that it gives to an expert are
            left out: an expert may be for general requests.
    """
    claimed = (background @ ridge[0].T + ridge[1]).max(dim=1).values >= _CLAIMED
    away = background[~claimed]
    if not len(away):
        return ridge
    target = torch.nn.functional.pad(membership, (0, 1, 0, len(away)))
    target[len(x) :, -1] = 1
    weight, bias = _ridge(torch.cat([x, away]), target)
    return weight[:-1] - weight[-1], bias[:-1] - bias[-1]
