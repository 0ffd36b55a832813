"""The part of its gain that an expert keeps: predicted from its weights, and corrected by what prompts measure.

The gain of an expert is what it adds to the dense expert. With prompts it is measured as divergence in nats:
kept = 1 − KL(expert ‖ stored) / KL(expert ‖ dense). If the dense expert is a merge by another method, the measured gain
is over the base.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergekit.common import ModelReference
from tqdm import tqdm

from mergekit_mediator.merge.config import MediatorConfig

Parts = Mapping[ModelReference, float]


@dataclass(frozen=True)
class Kept:
    """The part of its gain that an expert keeps.

    Attributes:
        predicted: from its weights, in [0, 1].
        measured: on held-out prompts, at most 1; None without prompts.
        divergences: KL(expert ‖ stored) in nats per answer, the mean of all prompts, before tuning: measured of each
            division of a budget that was tried; empty unless prompts divided one.
    """

    predicted: float
    measured: float | None = None
    divergences: Sequence[float] = ()


# Each correction writes and tunes the experts anew.
CORRECTIONS = 2
# A measured loss between these multiples of the allowed one is near enough: few prompts tell no more.
_TOO_LITTLE, _TOO_MUCH = 0.4, 1.1
_LEAST_LOST, _MOST_LOST = 1e-4, 0.9  # of a measured loss, which scatters around 0 and 1
_LARGEST_POWER = 3.0  # of one correction
_ROUNDING = 1e-6  # of a predicted part


def corrected(keep: float, targets: Parts, measured: Parts) -> dict[ModelReference, float]:
    """Correct the predicted parts that are aimed at, so that the measured ones come near to `keep`.

    The logarithm of what is lost is taken as proportional to that of the prediction, because both are about
    powers of the squared change that is left out.

    Args:
        keep: the part that every expert shall keep, in (0, 1).
        targets: the predicted part that was aimed at, for each expert.
        measured: the measured part of each expert that has prompts.

    Returns:
        The new targets, equal to the old ones where the measured part is near enough.
    """
    new = dict(targets)
    for model, part in measured.items():
        lost, allowed = 1 - part, 1 - keep
        if _TOO_LITTLE * allowed <= lost <= _TOO_MUCH * allowed:
            continue
        lost = min(max(lost, _LEAST_LOST), _MOST_LOST)
        power = math.log(allowed) / math.log(lost)
        power = min(max(power, 1 / _LARGEST_POWER), _LARGEST_POWER)
        new[model] = 1 - (1 - targets[model]) ** power
    return new


def is_capped(config: MediatorConfig, predicted: Parts) -> bool:
    """Whether a budget decides how many bytes experts take.

    Args:
        config: the configuration of the merge.
        predicted: the predicted part of each expert within the budget.
    """
    if config.budget is None or not predicted:
        return False
    return config.keep is None or min(predicted.values()) < config.keep - _ROUNDING


def warn_of_cap(config: MediatorConfig, targets: Parts, predicted: Parts) -> None:
    """Say what can be kept if a budget, or the form of the experts, allows less than `keep` asks for.

    Args:
        config: the configuration of the merge.
        targets: the predicted part that was aimed at, for each expert; less than `keep` where prompts showed that
            less is enough.
        predicted: the predicted part of each expert.
    """
    if config.keep is None or (config.budget is None and not config.stores_signs):
        return
    if all(part >= targets[model] - _ROUNDING for model, part in predicted.items()):
        return
    least = min(predicted, key=lambda model: predicted[model])
    kept = f"{config.experts[least]} is predicted to keep {predicted[least]:.4f} of its gain"
    if config.budget is not None:
        tqdm.write(
            f"warning: budget: {config.budget} is too little to keep {config.keep:g}: {kept}: raise the budget, or "
            "lower keep"
        )
    else:
        tqdm.write(
            f"warning: keep: random signs cannot keep {config.keep:g}: {kept}: leave out `values`, or lower keep"
        )
