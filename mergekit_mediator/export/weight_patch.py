"""An expert or a blend as new values at the coordinates that it changes: exactly what transformers serves."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_mediator.delta.stored_weight import mix_
from mergekit_mediator.export.experts import StoredExperts


@dataclass(frozen=True)
class WeightPatch:
    """The values of one weight that a mixture changes.

    Attributes:
        weight: its name in the checkpoint.
        shape: of the weight.
        positions: of the changed values in the flattened weight, `[k]` int64, ascending.
        values: under the mixture, `[k]` in the checkpoint's dtype.
        dense: in the dense expert, `[k]` in the checkpoint's dtype.
    """

    weight: str
    shape: tuple[int, ...]
    positions: Tensor
    values: Tensor
    dense: Tensor


def weight_patches(experts: StoredExperts, mixture: Mapping[str, float]) -> Iterator[WeightPatch]:
    """The patches that turn the dense expert into a mixture, weight by weight.

    Args:
        experts: of an artifact, relative to its dense expert.
        mixture: weights by expert.

    Raises:
        ExportError: an unknown expert.
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
