"""The division of a budget by what it does to answers: experts are stored, measured and stored anew."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from mergekit.common import ModelReference

from mergekit_mediator.delta.allocation import Divergences
from mergekit_mediator.merge.experts.tuning import Tuning

Slopes = Mapping[ModelReference, float]
# Each correction writes the experts anew, and decomposes nothing.
CORRECTIONS = 2
# Slopes are near where their logarithms differ by less: the bytes of an expert then differ by about two percent.
_NEAR = 0.05


def measure_divergences(
    tuning: Tuning,
    divide: Callable[[Mapping[ModelReference, Divergences]], Slopes],
    write: Callable[[Slopes], Mapping[ModelReference, Path]],
) -> dict[ModelReference, dict[float, float]]:
    """Measure the divergence of every expert that has prompts near the slope that its part of the budget allows.

    Args:
        tuning: measures experts.
        divide: chooses the slope of each expert, given what has been measured so far.
        write: writes the experts at their slopes; returns their files, which are gone afterwards.

    Returns:
        KL(expert ‖ stored) in nats per answer by slope, of each expert, in the order of the measurements.
    """
    measured: dict[ModelReference, dict[float, float]] = {}
    slopes = divide(measured)
    for _ in range(CORRECTIONS):
        files = write(slopes)
        for model, divergence in tuning.divergences(files).items():
            measured.setdefault(model, {})[slopes[model]] = divergence
        for path in files.values():
            path.unlink()
        before, slopes = slopes, divide(measured)
        if all(abs(math.log(slopes[model] / before[model])) < _NEAR for model in slopes):
            break
    return measured
