"""What every budget would keep: predicted quality against bytes, before anything is written."""

import math
from dataclasses import dataclass

from mergekit_mediator.delta.allocation import LOSS_POWER, Allocation

# Everything together over the dense expert alone, as people ask for it in `budget`.
_SIZES = (1.01, 1.02, 1.03, 1.04, 1.06, 1.08, 1.1, 1.15, 1.2, 1.25, 1.35, 1.5, 1.75, 2, 3, 4, 6, 8)
_NOTHING_LEFT = 1e-3


@dataclass(frozen=True)
class Point:
    """One budget.

    Attributes:
        over_dense: everything together over the dense expert alone, as `budget` has it.
        total_bytes: the same in bytes.
        bits: per parameter and expert.
        left: part of the squared change from base to expert that is not stored, in [0, 1], mean of experts.
        loss_recovered: predicted part of the loss between the average and each expert, in [0, 1], mean of
            experts.
    """

    over_dense: float
    total_bytes: int
    bits: float
    left: float
    loss_recovered: float


def curve(
    allocation: Allocation, numel: int, checkpoint_bytes: int, fixed_bytes: int
) -> list[Point]:
    """The budgets that are possible, up to that which leaves nothing out.

    Args:
        allocation: among the experts.
        numel: of all stored weights of all experts.
        checkpoint_bytes: of the dense expert's checkpoint, with its tokenizer: what `1x` is.
        fixed_bytes: of this and all else that does not depend on the budget.
    """
    points: list[Point] = []
    for size in _SIZES:
        stored = 8 * (size * checkpoint_bytes - fixed_bytes)
        nothing_left = points and points[-1].left < _NOTHING_LEFT
        if not allocation.least < stored < allocation.most or nothing_left:
            continue
        left = allocation.left(stored)
        points.append(
            Point(
                size,
                round(size * checkpoint_bytes),
                stored / numel,
                math.fsum(left) / len(left),
                math.fsum(map(predicted_loss_recovered, left)) / len(left),
            )
        )
    return points


def predicted_loss_recovered(left: float) -> float:
    """From the part of an expert's squared change that is left out, in [0, 1]."""
    return float(1 - left**LOSS_POWER)
