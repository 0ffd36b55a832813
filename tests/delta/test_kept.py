import numpy as np
import pytest

from mergekit_mediator.delta.kept import predicted_kept


def test_an_expert_that_leaves_out_everything_keeps_nothing():
    assert predicted_kept(1.0) == 0


def test_an_expert_that_leaves_out_nothing_keeps_all():
    assert predicted_kept(0.0) == pytest.approx(1)


@pytest.mark.parametrize(("left", "kept"), [(0.53, 0.86), (0.159, 0.9899), (0.107, 0.9968)])
def test_measured_points_are_met(left, kept):
    assert predicted_kept(left) == pytest.approx(kept)


def test_more_left_out_keeps_less():
    assert (np.diff(predicted_kept(np.linspace(0.01, 1, 500))) < 0).all()
