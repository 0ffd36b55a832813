import numpy as np
import pytest

from mergekit_mediator.delta.kept import NOISE_POWER, kept_in_noise, lost_to_noise, predicted_kept


def test_an_expert_that_leaves_out_everything_keeps_nothing():
    assert predicted_kept(1.0) == 0


def test_an_expert_that_leaves_out_nothing_keeps_all():
    assert predicted_kept(0.0) == pytest.approx(1)


@pytest.mark.parametrize(("left", "kept"), [(0.53, 0.86), (0.159, 0.9899), (0.107, 0.9968)])
def test_measured_points_are_met(left, kept):
    assert predicted_kept(left) == pytest.approx(kept)


def test_more_left_out_keeps_less():
    assert (np.diff(predicted_kept(np.linspace(0.01, 1, 500))) < 0).all()


def test_what_is_lost_to_noise_grows_as_a_power_of_it():
    lost = 1 - kept_in_noise([0.0, 1.0, 5.0, 10.0], 1e-6)
    assert lost[0] == 0
    assert lost[2] == pytest.approx(0.0095, abs=1e-4)
    assert lost[3] == pytest.approx(2**NOISE_POWER * lost[2])
    assert kept_in_noise(1e6, 1e-6) == 0


def test_as_much_noise_costs_more_where_the_change_is_large_beside_the_base():
    lost = lost_to_noise(5.0, [1e-6, 1e-5, 1e-3, 0.1])
    assert lost[0] == lost[1] == pytest.approx(0.0095, abs=1e-4)
    assert lost[2] > 10 * lost[1]
    assert lost[3] > 1
    assert kept_in_noise(5.0, 0.1) == 0
