import numpy as np
import pico
import pytest
import torch
from commands import call, figures, write

from mergekit_mediator import MediatorModel
from mergekit_mediator.delta.allocation import Allocation
from mergekit_mediator.delta.curve import curve
from mergekit_mediator.delta.loss_law import LEFT_OUT
from mergekit_mediator.delta.tradeoff import SLOPES


@pytest.fixture(scope="module")
def wide(make):
    return make(lambda: pico.llama(hidden_size=128, intermediate_size=384, head_dim=64))


@pytest.fixture(scope="module")
def points(wide, tmp_path_factory):
    config = write(wide.config(route="all"), tmp_path_factory.mktemp("curve") / "config.yml")
    return figures("plan", config, "--curve", "--quiet")["curve"]


def test_more_bytes_leave_less_error(points):
    assert len(points) > 3
    for column, descending in [("total_bytes", False), ("bits", False), ("left", True)]:
        values = [point[column] for point in points]
        assert values == sorted(values, reverse=descending)
        assert len(set(values)) == len(values)


def test_a_merge_leaves_the_error_that_the_curve_predicts(wide, points, merged, read):
    point = next(p for p in points if p["over_dense"] == 1.5)
    model = MediatorModel.from_pretrained(merged(wide.config(budget="1.5x")))
    base = read(wide.base)
    lost = change = 0.0
    for name, path in wide.experts.items():
        expert = read(path)
        with model.mixture({name: 1.0}) as mixed:
            for key, weight in mixed.state_dict().items():
                lost += float((weight.float() - expert[key].float()).square().sum())
                change += float((base[key].float() - expert[key].float()).square().sum())
    # bfloat16 rounds mixed weights, and a merge holds back a small part of the budget.
    assert lost / change == pytest.approx(point["left"], rel=0.35, abs=0.01)


def test_the_table_and_the_picture_show_the_same_budgets(wide, points, tmp_path):
    config = write(wide.config(budget="1.5x"), tmp_path / "config.yml")
    shown = call("plan", config, "--curve", "--quiet", "--plot", tmp_path / "curve.png").output
    for point in points:
        assert f"{point['over_dense']:g}x" in shown
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_budgets_below_the_fixed_bytes_are_left_out():
    bits = torch.linspace(800, 8000, len(SLOPES), dtype=torch.float64)
    left = 2.0 ** -torch.arange(len(SLOPES), dtype=torch.float64)
    tradeoff = torch.stack([bits, left, torch.ones_like(left), torch.zeros_like(left)])
    points = curve(Allocation([tradeoff]), 1000, checkpoint_bytes=1000, fixed_bytes=1100)
    sizes = [p.over_dense for p in points]
    assert min(sizes) == 1.25
    assert points[-2].left >= 1e-3 > points[-1].left


def test_no_change_keeps_no_gain_and_the_whole_change_keeps_all():
    assert LEFT_OUT.kept(np.array([1.0, 0.0]), np.zeros(2)).tolist() == [0.0, 1.0]
