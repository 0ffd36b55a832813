"""The divergence of stored experts from the experts at every slope, from what prompts measure at a few slopes."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

# The divergence is about this power of the part of the squared change that is left out. On development prompts of one
# strong fine-tune of SmolLM2-135M the power was 3.8 with 0.45 to 0.25 left out, and 2.6 with 0.25 to 0.14; no results
# file holds it. It matters little: a second measurement takes its place.
DIVERGENCE_POWER = 3.0
_LEAST = 1e-9  # nats; stands for a measured divergence of 0 or less, which has no logarithm

Floats = NDArray[np.float64]


def divergence_curves(left: Floats, measured: Sequence[Mapping[int, float]]) -> Floats:
    """Interpolate measured divergences in logarithms, and extend them by `DIVERGENCE_POWER`.

    The formula is this project's own. An expert without measurements is taken to diverge as the others do, on the
    geometric mean, where as much is left out.

    Args:
        left: `[n_experts, n]`, the part of the squared change that is left out at each place, above 0, falling.
        measured: of each expert the divergence in nats by place; at least one expert has one.

    Returns:
        The divergence of each expert at each place, `[n_experts, n]`, in nats.
    """
    logs = np.log(left)
    by_power = DIVERGENCE_POWER * logs
    rows = range(len(left))
    curves = {i: _curve(logs[i], measured[i]) for i in rows if measured[i]}
    usual = np.mean([float((curve - by_power[i])[max(measured[i])]) for i, curve in curves.items()])
    stacked = np.stack([curves.get(i, by_power[i] + usual) for i in rows])
    return np.asarray(np.exp(stacked), dtype=np.float64)


def _curve(logs: Floats, measured: Mapping[int, float]) -> Floats:
    """The logarithm of the divergence of one expert. What rises where less is left out is scatter."""
    places = sorted(measured, reverse=True)  # np.interp requires the least first
    values = np.log([max(measured[place], _LEAST) for place in places])
    known = logs[places]
    beyond = logs - np.clip(logs, known[0], known[-1])
    return np.interp(logs, known, np.maximum.accumulate(values)) + DIVERGENCE_POWER * beyond
