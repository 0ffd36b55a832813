"""How the loss of a stored expert follows from its squared error, which depends on the kind of this error."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mergekit_mediator.delta.kept import (
    NOISE_POWER,
    kept_in_noise,
    lost_of_left_out,
    lost_to_noise,
)
from mergekit_mediator.delta.value_forms import RateForm

# A budget is divided as if the loss were this power of the part of the squared change that is left out. In
# benchmarks/results/codec.json the power is 5 for weak fine-tunes at half a bit and more, and 7 for strong ones; broad ones
# lose about as its square. It is a matter of how experts share, not of how much they keep.
LOSS_POWER = 5
# The divergence is about this power of the part of the squared change that is left out. On development prompts of one
# strong fine-tune of SmolLM2-135M the power was 3.8 with 0.45 to 0.25 left out, and 2.6 with 0.25 to 0.14; no results
# file holds it. It matters little: a second measurement takes its place.
DIVERGENCE_POWER = 3.0

Floats = NDArray[np.float64]
# Of a squared error over the squared change, and of the squared change over the squared base.
Prediction = Callable[[Floats, Floats], Floats]


@dataclass(frozen=True)
class LossLaw:
    """A prediction of the loss from squared error.

    Attributes:
        kept: the part of its gain over the dense expert that an expert keeps, in [0, 1].
        loss: the loss of an expert as a part of what it gains; a budget is divided so that the sum is least.
        divergence_power: of the squared error, to which KL(expert ‖ stored) is proportional beyond what was measured.
    """

    kept: Prediction
    loss: Prediction
    divergence_power: float


def loss_of_left_out(left: Floats, change: Floats) -> Floats:
    """The loss by which a budget is divided, from the part of the squared change that is left out."""
    return np.asarray(left**LOSS_POWER, dtype=np.float64)


# The error is what the form leaves out of the change: it makes the expert weaker.
LEFT_OUT = LossLaw(
    kept=lambda left, change: 1 - lost_of_left_out(left, change),
    loss=loss_of_left_out,
    divergence_power=DIVERGENCE_POWER,
)
# The error is noise without a direction.
NOISE = LossLaw(kept=kept_in_noise, loss=lost_to_noise, divergence_power=NOISE_POWER)
LAWS: Mapping[RateForm, LossLaw] = {"low_rank": LEFT_OUT, "random_sign": NOISE}
