import numpy as np
import pytest

from mergekit_mediator.delta.divergence import divergence_curves
from mergekit_mediator.delta.loss_law import DIVERGENCE_POWER

LEFT = np.geomspace(1.0, 1e-3, 31)[None]


def test_a_curve_passes_through_what_was_measured():
    (curve,) = divergence_curves(LEFT, [{10: 0.4, 20: 0.01}], [DIVERGENCE_POWER])
    assert curve[10] == pytest.approx(0.4)
    assert curve[20] == pytest.approx(0.01)
    assert curve[15] == pytest.approx(np.sqrt(0.4 * 0.01))
    assert np.all(np.diff(curve) < 0)


def test_beyond_the_measurements_the_power_of_what_is_left_out_holds():
    (curve,) = divergence_curves(LEFT, [{10: 0.4}], [DIVERGENCE_POWER])
    assert curve == pytest.approx(0.4 * (LEFT[0] / LEFT[0, 10]) ** DIVERGENCE_POWER)


@pytest.mark.parametrize("finer", [0.5, 0.1, 0.0, -1e-6])
def test_scatter_makes_no_curve_rise_or_end(finer):
    (curve,) = divergence_curves(LEFT, [{10: 0.1, 12: finer}], [DIVERGENCE_POWER])
    assert np.all(np.isfinite(curve))
    assert np.all(np.diff(curve) <= 0)


def test_an_expert_without_measurements_diverges_as_the_others_do():
    curves = divergence_curves(
        np.repeat(LEFT, 3, 0), [{10: 0.4}, {}, {10: 0.1}], [DIVERGENCE_POWER] * 3
    )
    assert curves[1] == pytest.approx(np.sqrt(curves[0] * curves[2]))
