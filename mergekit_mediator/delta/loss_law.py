"""How the loss of a stored expert follows from its squared error, which depends on the kind of this error."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mergekit_mediator.delta.kept import NOISE_POWER, predicted_kept, predicted_kept_in_noise

# The part of the loss between average and expert that is not recovered is about this power of the part of the
# squared change that is left out. In benchmarks/results/codec.json the power is 5 for weak fine-tunes at half a
# bit and more, and 7 for strong ones.
LOSS_POWER = 5
# The divergence is about this power of the part of the squared change that is left out. On development prompts of one
# strong fine-tune of SmolLM2-135M the power was 3.8 with 0.45 to 0.25 left out, and 2.6 with 0.25 to 0.14; no results
# file holds it. It matters little: a second measurement takes its place.
DIVERGENCE_POWER = 3.0


@dataclass(frozen=True)
class LossLaw:
    """A prediction of the loss from squared error, as a part of the expert's squared change.

    Attributes:
        kept: the part of its gain over the dense expert that the expert keeps, in [0, 1], at each squared error.
        recovered: the same for the loss of all experts together, as `plan` tells it.
        power: of the squared error, to which the loss is proportional, where a budget is divided.
        divergence_power: of the squared error, to which KL(expert ‖ stored) is proportional beyond what was measured.
    """

    kept: Callable[[ArrayLike], NDArray[np.float64]]
    recovered: Callable[[float], float]
    power: float
    divergence_power: float


def predicted_loss_recovered(left: float) -> float:
    """Predict the recovered part of the loss, in [0, 1], from the part of the squared change that is left out."""
    return float(1 - left**LOSS_POWER)


# The error is what the form leaves out of the change: it makes the expert weaker.
LEFT_OUT = LossLaw(predicted_kept, predicted_loss_recovered, LOSS_POWER, DIVERGENCE_POWER)
# The error is noise without a direction.
NOISE = LossLaw(
    predicted_kept_in_noise,
    lambda noise: float(predicted_kept_in_noise(noise)),
    NOISE_POWER,
    NOISE_POWER,
)
