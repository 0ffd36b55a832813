"""`lora_lego`: the rank-one units of all adapters, clustered; each cluster becomes one unit of the merged adapter."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_mediator.delta.factors import Factors

METHOD = "lora_lego"
_MOST_ROUNDS = 100


def merge_factors(adapters: Sequence[Factors], rank: int, scale: float) -> Factors:
    """Merge the factors of several adapters for one weight, after Zhao et al., "Merging LoRAs like Playing LEGO" (2024).

    The unit i of an adapter is b_i a_iᵀ. As a vector [b_i, a_i] it is put into one of `rank` clusters by k-means. A
    cluster becomes its mean, stretched to the mean norm of its units, as a mean is shorter than what it is of; and
    the sum is multiplied by √(r / rank) for adapters of rank r, so that more units do not give a larger output.
    The abstract names the two reweightings; these formulas of them are ours.

    Args:
        adapters: of one weight, all of one rank.
        rank: of the result, at most that of all units together.
        scale: what the result is multiplied by.

    Returns:
        Float32 factors.
    """
    units = torch.cat([_units(factors) for factors in adapters])
    clusters = k_means(units, rank)
    merged = []
    for cluster in range(rank):
        own = units[clusters == cluster]
        mean = own.mean(dim=0)
        norm = mean.norm()
        stretch = own.norm(dim=1).mean() / norm if norm else norm
        merged.append(mean * stretch)
    out = adapters[0].left.shape[0]
    stacked = torch.stack(merged, dim=1)
    factor = scale * math.sqrt(adapters[0].rank / rank)
    return Factors(
        stacked[:out].contiguous(), stacked[out:].contiguous(), torch.full((rank,), factor)
    )


def _units(factors: Factors) -> Tensor:
    """Every unit as one vector [b_i, a_i] with its scale in equal parts, `[r, out + in]` float32."""
    root = factors.scales.abs().sqrt()
    left = factors.left.to(torch.float32) * root * factors.scales.sign()
    right = factors.right.to(torch.float32) * root
    return torch.cat([left, right]).T


def k_means(points: Tensor, count: int) -> Tensor:
    """The cluster of each point, none of them empty.

    The first centre is the longest point, each next one the point that is farthest from all before: no random
    number is drawn, and the order of the points matters only where distances are equal.

    Args:
        points: `[n, d]` float32.
        count: of clusters, from 1 to n.

    Returns:
        `[n]` int64, from 0 to `count` − 1.
    """
    chosen = [int(points.norm(dim=1).argmax())]
    nearest = (points - points[chosen[0]]).norm(dim=1)
    while len(chosen) < count:
        free = nearest.clone()
        free[chosen] = -1
        chosen.append(int(free.argmax()))
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).norm(dim=1))
    centres, clusters = points[chosen], torch.empty(0)
    for _ in range(_MOST_ROUNDS):
        distances = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")
        found = distances.argmin(dim=1)
        for empty in sorted(set(range(count)) - set(found.tolist())):
            # the farthest point of a cluster that has others
            crowded = torch.bincount(found, minlength=count)[found] > 1
            far = distances.gather(1, found[:, None])[:, 0].masked_fill(~crowded, -1)
            found[int(far.argmax())] = empty
        if clusters.shape == found.shape and bool((clusters == found).all()):
            break
        clusters = found
        centres = torch.stack([points[clusters == c].mean(dim=0) for c in range(count)])
    return clusters
