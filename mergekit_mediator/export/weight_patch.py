"""An expert or a blend as new values at the coordinates that it changes: the exact weights that `serve` uses."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_mediator.delta.mixing import mix_
from mergekit_mediator.export.experts import StoredExperts


@dataclass(frozen=True)
class WeightPatch:
    """The values of one weight that a mixture changes.

    Attributes:
        weight: the weight's name in the checkpoint.
        shape: the weight's shape.
        positions: the places of the changed values in the flattened weight, `[k]` int64, ascending.
        values: the values under the mixture, `[k]` in the checkpoint's dtype.
        dense: the values in the dense expert, `[k]` in the checkpoint's dtype.
    """

    weight: str
    shape: tuple[int, ...]
    positions: Tensor
    values: Tensor
    dense: Tensor


def weight_patches(experts: StoredExperts, mixture: Mapping[str, float]) -> Iterator[WeightPatch]:
    """Make the patches that turn the dense expert into a mixture, weight by weight.

    Args:
        experts: the artifact's experts, relative to its dense expert.
        mixture: a weight above 0 by expert.

    Yields:
        The patch of each weight that the mixture changes.

    Raises:
        ExportError: an expert is unknown.
    """
    for change in experts.changes(mixture):
        dense = experts.dense.weight(change.weight).contiguous()
        mixed = dense.clone()
        mix_(mixed, change.parts)
        before, after = dense.view(-1), mixed.view(-1)
        positions = torch.nonzero(before != after).view(-1)
        if positions.numel():
            yield WeightPatch(
                change.weight, change.shape, positions, after[positions], before[positions]
            )
