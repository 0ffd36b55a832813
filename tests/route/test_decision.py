"""Scores to decisions, and decisions to mixtures."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergekit_mediator.errors import RoutingError
from mergekit_mediator.route.decision import (
    RoutingDecision,
    Thresholds,
    apply_policy,
    decide_from_scores,
)
from mergekit_mediator.serve.choice import mixtures_of
from mergekit_mediator.serve.settings import Settings

NAMES = ("code", "math", "chat")

finite = st.floats(-50, 50, width=32)
score_rows = st.lists(st.lists(finite, min_size=3, max_size=3), min_size=1, max_size=4)


def decision(rows: list[list[float]], ood: list[float] | None = None) -> RoutingDecision:
    weights = torch.tensor(rows)
    entropy = torch.special.entr(weights).sum(dim=1)
    far = torch.full((len(rows),), math.nan) if ood is None else torch.tensor(ood)
    return RoutingDecision(weights, entropy, far, NAMES)


def one_hot(index: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor([index]), 3).float()


@given(score_rows, st.floats(0.05, 20))
def test_weights_and_entropy_match_a_naive_softmax(
    rows: list[list[float]], temperature: float
) -> None:
    got = decide_from_scores(torch.tensor(rows), NAMES, temperature)
    for row, weights, entropy in zip(rows, got.weights, got.entropy, strict=True):
        top = max(row)
        powers = [math.exp((value - top) / temperature) for value in row]
        naive = [power / sum(powers) for power in powers]
        assert weights.tolist() == pytest.approx(naive, abs=1e-5)
        assert float(entropy) == pytest.approx(
            -sum(p * math.log(p) for p in naive if p > 0), abs=1e-4
        )


@given(score_rows, finite)
def test_a_constant_added_to_all_scores_changes_nothing(
    rows: list[list[float]], shift: float
) -> None:
    plain = decide_from_scores(torch.tensor(rows, dtype=torch.float64), NAMES)
    moved = decide_from_scores(torch.tensor(rows, dtype=torch.float64) + shift, NAMES)
    torch.testing.assert_close(plain.weights, moved.weights, atol=1e-4, rtol=1e-3)


def test_a_router_without_a_distance_says_so_with_nan() -> None:
    assert decide_from_scores(torch.zeros(2, 3), NAMES).ood.isnan().all()


def test_normalized_entropy_of_a_uniform_decision_is_one() -> None:
    got = decide_from_scores(torch.zeros(1, 3), NAMES)
    assert float(got.normalized_entropy) == pytest.approx(1.0)


def test_one_expert_alone_is_certain() -> None:
    got = decide_from_scores(torch.zeros(2, 1), ["only"])
    assert got.normalized_entropy.tolist() == [0.0, 0.0]
    assert apply_policy(got, "auto", 0.5).tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("shape", [(3,), (1, 2), (1, 4)])
def test_scores_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RoutingError, match="3 experts"):
        decide_from_scores(torch.zeros(shape), NAMES)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused_by_row(bad: float) -> None:
    with pytest.raises(RoutingError, match="request 1"):
        decide_from_scores(torch.tensor([[0.0, 0, 0], [0, bad, 0]]), NAMES)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(RoutingError, match="temperature"):
        decide_from_scores(torch.zeros(1, 3), NAMES, temperature)


def test_hard_takes_the_likeliest_and_soft_keeps_all() -> None:
    unsure = decision([[0.2, 0.5, 0.3]])
    assert torch.equal(apply_policy(unsure, "hard"), one_hot(1))
    assert torch.equal(apply_policy(unsure, "soft"), unsure.weights)


def test_auto_is_hard_for_sure_rows_and_soft_for_others() -> None:
    both = decision([[0.98, 0.01, 0.01], [0.4, 0.3, 0.3]])
    got = apply_policy(both, "auto", 0.5)
    assert torch.equal(got[:1], one_hot(0))
    assert torch.equal(got[1], both.weights[1])


def test_auto_may_leave_unsure_rows_to_the_dense_expert() -> None:
    both = decision([[0.98, 0.01, 0.01], [0.4, 0.3, 0.3]])
    got = apply_policy(both, "auto", 0.5, unsure="dense")
    assert torch.equal(got[:1], one_hot(0))
    assert got[1].tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(apply_policy(both, "soft", unsure="dense"), both.weights)


def test_far_requests_lean_on_the_dense_expert_as_the_policy_chose() -> None:
    far = decision([[0.98, 0.01, 0.01], [0.4, 0.3, 0.3]], [5 + math.sqrt(2)] * 2)
    got = apply_policy(far, "auto", 0.5, unsure="dense", ood_threshold=5)
    assert got[0].tolist() == pytest.approx([1 / math.e, 0.0, 0.0])
    assert got[1].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("calibrated", "set_by_user", "blends"),
    [(0.0, None, True), (None, None, False), (0.0, 1.0, False), (1.0, 0.0, True)],
)
def test_the_threshold_is_the_users_or_the_calibrated_one(calibrated, set_by_user, blends) -> None:
    settings = Settings(entropy_threshold=set_by_user)
    sure = decision([[0.98, 0.01, 0.01]])
    got = mixtures_of(sure, settings, Thresholds(calibrated, None), sure.experts)
    assert torch.equal(got, sure.weights if blends else one_hot(0))


@pytest.mark.parametrize("threshold", [-0.1, 7, math.nan])
def test_a_threshold_of_entropy_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(RoutingError, match=r"entropy_threshold must be .* 0 to 1, got"):
        apply_policy(decision([[0.8, 0.1, 0.1]]), "auto", threshold)


@pytest.mark.parametrize(
    ("action", "want"),
    [
        ("blend", [0.8 / math.e, 0.1 / math.e, 0.1 / math.e]),
        ("dense", [0.0, 0.0, 0.0]),
        ("fallback", [0.0, 0.0, 1.0]),
    ],
)
def test_far_requests_get_the_action_and_others_do_not(action: str, want: list[float]) -> None:
    rows = decision([[0.8, 0.1, 0.1]] * 2, [5 + math.sqrt(2), 1.0])
    got = apply_policy(rows, "hard", ood_threshold=5, ood_action=action, fallback="chat")  # type: ignore[arg-type]
    assert got[0].tolist() == pytest.approx(want)
    assert torch.equal(got[1:], one_hot(0))


def test_the_farther_a_request_the_less_of_the_experts_and_far_away_none() -> None:
    rows = decision([[0.8, 0.1, 0.1]] * 4, [5.001, 5.5, 7.0, 50.0])
    got = apply_policy(rows, ood_threshold=5, ood_action="blend")
    assert got[0].tolist() == pytest.approx([0.8, 0.1, 0.1], abs=1e-3)
    assert got.sum(dim=1).diff().lt(0).all()
    assert got[3].tolist() == [0.0, 0.0, 0.0]


def test_refusal_names_the_request() -> None:
    rows = decision([[0.8, 0.1, 0.1]] * 2, [1.0, 9.0])
    with pytest.raises(RoutingError, match="request 1 is out of distribution"):
        apply_policy(rows, ood_threshold=5, ood_action="refuse")


def test_a_request_of_unknown_distance_is_never_far() -> None:
    got = apply_policy(decision([[0.8, 0.1, 0.1]]), "hard", ood_threshold=-9, ood_action="refuse")
    assert torch.equal(got, one_hot(0))


def test_unknown_choices_are_refused_by_name() -> None:
    rows = decision([[0.8, 0.1, 0.1]], [9.0])
    with pytest.raises(RoutingError, match="hard, soft, auto"):
        apply_policy(rows, "best")  # type: ignore[arg-type]
    with pytest.raises(RoutingError, match="blend, dense"):
        apply_policy(rows, ood_threshold=1, ood_action="panic")  # type: ignore[arg-type]
    with pytest.raises(RoutingError, match="code, math, chat"):
        apply_policy(rows, ood_threshold=1, ood_action="fallback", fallback="medicine")
