import json
from pathlib import Path

import numpy as np
import pytest

from mergekit_mediator.delta.kept import (
    NOISE_POWER,
    kept_in_noise,
    lost_of_left_out,
    lost_to_noise,
    predicted_kept,
)

RESULTS = Path(__file__).parents[2] / "benchmarks/results"


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


def test_all_is_lost_if_all_is_left_out_and_nothing_if_nothing_is():
    assert lost_of_left_out([0.0, 1.0], 1e-5).tolist() == pytest.approx([0.0, 1.0], abs=1e-12)
    assert lost_of_left_out([0.5, 1.0], 1.0).tolist() == [1.0, 1.0]


def test_more_is_lost_of_a_change_that_is_large_beside_the_base():
    lost = lost_of_left_out(0.1, [0.0, 1e-5, 1e-4, 1e-3])
    assert (np.diff(lost) > 0).all()
    assert lost[0] == pytest.approx(0.012)


@pytest.mark.parametrize("family", ["broad", "heavy"])
def test_no_expert_kept_much_less_than_is_predicted_of_what_is_left_out(family):
    """Random signs are noise, and have a law of their own; a sign for each number has something of both."""
    rows = json.loads((RESULTS / f"{family}.json").read_text())["rows"]
    left_out = [row for row in rows if row["form"].startswith(("ours ", "8-3-2", "extract"))]
    for row in left_out:
        predicted = 1 - lost_of_left_out(row["left_out"], row["norm_over_base"] ** 2)
        if predicted > 0.8:
            assert row["gain_kept"] > predicted - 0.025, row
    assert len(left_out) > 5
