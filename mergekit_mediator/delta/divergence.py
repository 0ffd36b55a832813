"""The divergence of stored experts from the experts at every slope, from what prompts measure at a few slopes."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

_LEAST = 1e-9  # nats; stands for a measured divergence of 0 or less, which has no logarithm

Floats = NDArray[np.float64]


def divergence_curves(
    left: Floats, measured: Sequence[Mapping[int, float]], powers: Sequence[float]
) -> Floats:
    """Interpolate measured divergences in logarithms, and extend them by a power of the squared error.

    The formula is this project's own. An expert without measurements is taken to diverge as the others do, on the
    geometric mean, where the error is as large.

    Args:
        left: `[n_experts, n]`, the squared error over the squared change at each place, above 0, falling.
        measured: of each expert the divergence in nats by place; at least one expert has one.
        powers: of each expert, see `LossLaw.divergence_power`.

    Returns:
        The divergence of each expert at each place, `[n_experts, n]`, in nats.
    """
    logs = np.log(left)
    by_power = np.asarray(powers)[:, None] * logs
    rows = range(len(left))
    curves = {i: _curve(logs[i], measured[i], powers[i]) for i in rows if measured[i]}
    usual = np.mean([float((curve - by_power[i])[max(measured[i])]) for i, curve in curves.items()])
    stacked = np.stack([curves.get(i, by_power[i] + usual) for i in rows])
    return np.asarray(np.exp(stacked), dtype=np.float64)


def _curve(logs: Floats, measured: Mapping[int, float], power: float) -> Floats:
    """The logarithm of the divergence of one expert. What rises where the error is less is scatter."""
    places = sorted(measured, reverse=True)  # np.interp requires the least first
    values = np.log([max(measured[place], _LEAST) for place in places])
    known = logs[places]
    beyond = logs - np.clip(logs, known[0], known[-1])
    return np.interp(logs, known, np.maximum.accumulate(values)) + power * beyond
