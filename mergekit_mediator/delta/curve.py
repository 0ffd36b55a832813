"""The predicted quality of an artifact at every budget, before a merge writes anything."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from mergekit_mediator.delta.allocation import Allocation
from mergekit_mediator.delta.loss_law import NOISE

# Budgets, as multiples of the dense expert's checkpoint.
_SIZES = (1.01, 1.02, 1.03, 1.04, 1.06, 1.08, 1.1, 1.15, 1.2, 1.25, 1.35, 1.5, 1.75, 2, 3, 4, 6, 8)
# Parts of its gain that a user may want every expert to keep.
_PARTS = (0.9, 0.97, 0.99, 0.999)
# A curve ends at the first budget that leaves out less than this part of the squared change.
_LEAST_LEFT = 1e-3


@dataclass(frozen=True)
class Point:
    """The prediction for one budget.

    Attributes:
        over_dense: the bytes of the artifact over those of the dense expert's checkpoint, as in `budget`.
        total_bytes: of the artifact.
        bits: per parameter and expert.
        left: the squared error over the squared change from base to expert, mean of experts. It is what is not stored, in
            [0, 1]; of random signs it is noise, and may be several times the change.
        kept: the predicted part of its gain over the dense expert that an expert keeps, in [0, 1], mean of experts.
        is_noise: whether the squared error is noise, because experts are stored as random signs.
    """

    over_dense: float
    total_bytes: int
    bits: float
    left: float
    kept: float
    is_noise: bool


@dataclass(frozen=True)
class KeptPoint:
    """The prediction for one `keep`.

    Attributes:
        keep: the part of its gain over the dense expert that every expert keeps, in (0, 1).
        over_dense: the bytes of the artifact over those of the dense expert's checkpoint, as in `budget`.
        total_bytes: of the artifact.
        expert_bytes: of all experts together.
        bits: per parameter and expert.
        signs: the number of experts that are stored as random signs.
    """

    keep: float
    over_dense: float
    total_bytes: int
    expert_bytes: int
    bits: float
    signs: int


def kept_curve(
    keeping: Callable[[float], Allocation], numel: int, checkpoint_bytes: int, fixed_bytes: int
) -> list[KeptPoint]:
    """Predict the bytes at which every expert keeps each of a few parts of its gain, if its form can.

    Args:
        keeping: gives the allocation of experts in the forms in which they keep a part.
        numel: as for `curve`, and so are the others.
        checkpoint_bytes: see there.
        fixed_bytes: see there.
    """
    points = []
    for keep in _PARTS:
        allocation = keeping(keep)
        slopes = allocation.slopes_to_keep([keep] * allocation.count)
        if min(allocation.kept(slopes)) < keep:
            break  # no slope keeps as much
        bits = allocation.spent(slopes)
        total = round(fixed_bytes + bits / 8)
        sizes = (total / checkpoint_bytes, total, round(bits / 8), bits / numel)
        points.append(KeptPoint(keep, *sizes, _signs(allocation)))
    return points


def curve(
    allocation: Allocation, numel: int, checkpoint_bytes: int, fixed_bytes: int
) -> list[Point]:
    """Predict the points of all possible budgets, up to the first that leaves out next to nothing.

    Args:
        allocation: of the experts.
        numel: the parameters of all stored weights of all experts.
        checkpoint_bytes: of the dense expert's checkpoint with its tokenizer, which `1x` stands for.
        fixed_bytes: of all files and headers whose size does not depend on the budget, that checkpoint
            among them.
    """
    points: list[Point] = []
    for size in _SIZES:
        stored = 8 * (size * checkpoint_bytes - fixed_bytes)
        complete = points and points[-1].left < _LEAST_LEFT
        if not allocation.least < stored < allocation.most or complete:
            continue
        left = allocation.left(stored)
        points.append(
            Point(
                size,
                round(size * checkpoint_bytes),
                stored / numel,
                math.fsum(left) / len(left),
                math.fsum(allocation.kept_within(stored)) / len(left),
                bool(_signs(allocation)),
            )
        )
    return points


def _signs(allocation: Allocation) -> int:
    """Count the experts that are stored as random signs."""
    return sum(law is NOISE for law in allocation.laws)
