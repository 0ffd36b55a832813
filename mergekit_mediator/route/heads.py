"""The fit of a router's linear heads: one for the expert, and two for the distance from all experts."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mergekit_mediator.route.calibrated import CalibratedRouter, Head, Kind, standardized

# The first two were chosen on the tasks of benchmarks/router_development.py.
_RIDGE = 0.3  # penalty, as a fraction of the mean squared norm of centred features
_SHRINKAGE = 0.3  # of the covariance within classes, towards a multiple of the identity
_MEMBERSHIP_TO_CLAIM = (
    0.5  # predicted membership from which a background request belongs to an expert
)


def fit_heads(
    features: Mapping[str, Tensor],
    kind: Kind,
    head: Head,
    layers: tuple[int, ...],
    seed: int,
    background: Tensor,
) -> CalibratedRouter:
    """Fit a router, without the numbers and tokens that `fit.fit` adds.

    The computation is in float64, because it sums many rows that are nearly equal.

    Args:
        features: by expert, `[n_prompts, d]` float32.
        kind: see `CalibratedRouter`.
        head: see `fit.fit`.
        layers: see `CalibratedRouter`.
        seed: see `fit.fit`; it does not change this fit.
        background: see `CalibratedRouter`.

    Returns:
        A router whose `numbers` hold `variance` only, and whose `tokens` are empty.
    """
    raw = torch.cat(list(features.values())).double()
    center, scale = raw.mean(dim=0), raw.std(dim=0)
    scale = scale + scale.mean().clamp_min(
        1e-12
    )  # otherwise features that hardly vary would be noise
    x = standardized(raw, center, scale, len(layers) or 1)
    rows = torch.split(x, [len(f) for f in features.values()])
    means = torch.stack([r.mean(dim=0) for r in rows])
    within = torch.cat([r - r.mean(dim=0) for r in rows])
    values, vectors = _principal_axes(within / math.sqrt(len(x)))
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
    fit = _ridge_with_background(
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


def _principal_axes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the positive eigenvalues `[r]` of `rows.T @ rows` and their eigenvectors `[r, d]`.

    They come from `rows @ rows.T` if that is smaller; there are mostly fewer prompts than d.
    """
    wide = len(rows) < rows.shape[1]
    values, vectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    positive = values > 1e-10 * values.max().clamp_min(1e-300)
    values, vectors = values[positive], vectors[:, positive].T
    return values, (vectors @ rows) / values.sqrt()[:, None] if wide else vectors


def _ridge(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Compute weight `[k, d]` and bias `[k]` of ridge regression, in the dual form: mostly n is smaller than d."""
    center, level = x.mean(dim=0), target.mean(dim=0)
    z = x - center
    kernel = z @ z.T
    kernel.diagonal().add_(_RIDGE * kernel.diagonal().mean().clamp_min(1e-12))
    weight = torch.linalg.solve(kernel, target - level).T @ z
    return weight, level - weight @ center


def _ridge_with_background(
    x: Tensor, membership: Tensor, ridge: tuple[Tensor, Tensor], background: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute weight `[k, d]` and bias `[k]` of membership in each class minus that in the background.

    Background requests that `ridge` gives to an expert are left out: an expert may be for general requests.

    Args:
        x: `[n, d]`, the standardized features of the experts' prompts.
        membership: `[n, k]`, 1 for the expert of a prompt, otherwise 0.
        ridge: the result of `_ridge` for `x` and `membership`.
        background: `[m, d]`, the standardized features of the background requests.
    """
    memberships = (background @ ridge[0].T + ridge[1]).max(dim=1).values
    outsiders = background[~(memberships >= _MEMBERSHIP_TO_CLAIM)]
    if not len(outsiders):
        return ridge
    target = torch.nn.functional.pad(membership, (0, 1, 0, len(outsiders)))
    target[len(x) :, -1] = 1
    weight, bias = _ridge(torch.cat([x, outsiders]), target)
    return weight[:-1] - weight[-1], bias[:-1] - bias[-1]
