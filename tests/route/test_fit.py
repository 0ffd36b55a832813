"""The calibrated router: its fit, held-out figures and file, and experts that are added and removed."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_mediator.errors import ArtifactError, OutputError, RoutingError
from mergekit_mediator.route.calibrated import CalibratedRouter, Head, standardized
from mergekit_mediator.route.confidence import (
    auroc,
    expected_calibration_error,
    fit_temperature,
    reliability,
)
from mergekit_mediator.route.features import (
    embedding_features,
    hidden_layers,
    mean_embedding,
    mean_state,
    shared_tokens,
)
from mergekit_mediator.route.fit import add, fit, remove

WIDTH = 32
HEADS: tuple[Head, ...] = ("ridge", "mahalanobis", "prototype")


def cloud(center: int, count: int = 20, seed: int = 0, noise: float = 0.3) -> Tensor:
    """Features of one expert's prompts: the point of its class, with noise."""
    middle = torch.randn(WIDTH, generator=torch.Generator().manual_seed(center))
    generator = torch.Generator().manual_seed(1000 * seed + center + 1)
    return middle + noise * torch.randn(count, WIDTH, generator=generator)


def clouds(*names: str, seed: int = 0) -> dict[str, Tensor]:
    return {name: cloud(index, seed=seed) for index, name in enumerate(names)}


def standard(router: CalibratedRouter, x: Tensor) -> Tensor:
    return standardized(x, router.center, router.scale, 1)


def router(*names: str) -> CalibratedRouter:
    return fit(clouds(*names), "hidden", layers=(2, 3), tokens=torch.tensor([5])).router


@pytest.mark.parametrize("head", HEADS)
def test_new_prompts_of_the_same_kind_go_to_their_expert(head: Head) -> None:
    result = fit(clouds("a", "b", "c"), "embedding", head=head)
    new = torch.cat(list(clouds("a", "b", "c", seed=1).values()))
    decision = result.router.decide(new)
    assert decision.experts == ("a", "b", "c")
    assert decision.weights.argmax(dim=1).tolist() == [0] * 20 + [1] * 20 + [2] * 20
    assert result.figures["accuracy"] == 1.0
    assert result.warnings == ()


def test_mahalanobis_scores_and_distances_match_the_inverse_covariance() -> None:
    result = fit(clouds("a", "b", "c"), "embedding", head="mahalanobis").router
    rows = [standard(result, x).double() for x in clouds("a", "b", "c").values()]
    means = torch.stack([x.mean(dim=0) for x in rows])
    within = torch.cat([x - x.mean(dim=0) for x in rows])
    covariance = within.T @ within / len(within)
    level = covariance.trace() / WIDTH
    inverse = torch.linalg.inv(0.7 * covariance + 0.3 * level * torch.eye(WIDTH).double())
    x = cloud(1, 5, seed=2)
    z = standard(result, x).double()[:, None] - means
    squared = torch.einsum("bcd,de,bce->bc", z, inverse, z)
    got, _, distance = result.measure(x)
    want = -squared / 2
    torch.testing.assert_close(got - got[:, :1], (want - want[:, :1]).float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        distance, squared.sqrt().min(dim=1).values.float(), rtol=1e-4, atol=1e-4
    )


def test_ridge_matches_the_normal_equations() -> None:
    features = clouds("a", "b")
    result = fit(features, "embedding").router
    x = standard(result, torch.cat(list(features.values()))).double()
    target = torch.nn.functional.one_hot(torch.tensor([0] * 20 + [1] * 20)).double()
    z = x - x.mean(dim=0)
    penalty = 0.3 * z.square().sum(dim=1).mean()
    normal = z.T @ z + penalty * torch.eye(WIDTH).double()
    want = torch.linalg.solve(normal, z.T @ (target - target.mean(dim=0))).T
    torch.testing.assert_close(result.weight, want.float(), rtol=1e-4, atol=1e-5)


def test_a_far_prompt_scores_above_the_threshold_and_a_near_one_below() -> None:
    calibrated = router("a", "b", "c")
    known = calibrated.decide(cloud(0, 200, seed=5))
    far = calibrated.decide(cloud(20, 200, seed=5))
    threshold = calibrated.numbers["ood_threshold"]
    assert float((known.ood > threshold).float().mean()) < 0.1
    assert bool((far.ood > threshold).all())


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        fit(clouds("a", "b"), "embedding", seed=3).router.save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_adding_an_expert_equals_calibrating_with_all() -> None:
    every = clouds("a", "b", "c")
    later = add(fit({k: every[k] for k in ("a", "b")}, "embedding").router, "c", every["c"])
    at_once = fit(every, "embedding")
    assert torch.equal(later.router.weight, at_once.router.weight)
    assert later.figures == at_once.figures


def test_removing_an_expert_equals_calibrating_without() -> None:
    fewer = remove(router("a", "b", "c"), "c")
    assert torch.equal(fewer.router.weight, router("a", "b").weight)


def test_adding_and_removing_one_of_many_experts_leaves_the_features_and_routes_of_the_others() -> (
    None
):
    names = [f"e{i:02d}" for i in range(64)]
    with_all = fit(clouds(*names), "embedding").router
    without = remove(with_all, "e63").router
    again = add(without, "e63", with_all.features["e63"]).router
    requests = torch.cat([x for name, x in clouds(*names, seed=1).items() if name != "e63"])
    routes = torch.arange(63).repeat_interleave(20)
    for changed in (with_all, without, again):
        assert all(torch.equal(changed.features[n], with_all.features[n]) for n in names[:63])
        assert torch.equal(changed.decide(requests).weights.argmax(dim=1), routes)
    assert torch.equal(again.weight, with_all.weight)
    assert again.numbers == with_all.numbers


def test_removing_an_unknown_expert_or_all_but_one_is_refused() -> None:
    with pytest.raises(RoutingError, match="no expert 'z'"):
        remove(router("a", "b"), "z")
    with pytest.raises(RoutingError, match="at least two experts"):
        remove(router("a", "b"), "b")


def test_two_experts_with_the_same_data_are_warned_about() -> None:
    same = cloud(0)
    result = fit({"a": same, "b": same.clone(), "c": cloud(2)}, "embedding")
    assert any("'a'" in line and "'b'" in line for line in result.warnings)
    assert not any("'c'" in line for line in result.warnings)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"a": cloud(0)}, "at least two experts, got a"),
        ({"a": cloud(0), "b": cloud(1, 4)}, "'b'.*at least 5"),
        ({"a": cloud(0), "b": cloud(1) * math.nan}, "'b': finite features required"),
        ({"a": cloud(0), "b": cloud(1)[:, :9]}, r"one width required, got the widths \[9, 32\]"),
    ],
)
def test_unusable_features_are_refused(features: dict[str, Tensor], message: str) -> None:
    with pytest.raises(RoutingError, match=message):
        fit(features, "embedding")


def test_an_unknown_head_is_refused() -> None:
    with pytest.raises(RoutingError, match="ridge, mahalanobis, prototype"):
        fit(clouds("a", "b"), "embedding", head="tree")  # type: ignore[arg-type]


def test_features_of_another_width_or_not_finite_are_refused() -> None:
    with pytest.raises(RoutingError, match="another model"):
        router("a", "b").decide(torch.zeros(1, 7))
    with pytest.raises(RoutingError, match="must be finite"):
        router("a", "b").decide(torch.full((1, WIDTH), math.nan))


def test_a_router_decides_the_same_after_save_and_load(tmp_path: Path) -> None:
    path, before = tmp_path / "router.safetensors", router("a", "b", "c")
    before.save(path)
    after = CalibratedRouter.load(path)
    x = cloud(1, 9, seed=4)
    for field in ("weights", "entropy", "ood"):
        assert torch.equal(getattr(before.decide(x), field), getattr(after.decide(x), field))
    assert (after.kind, after.layers, after.head) == ("hidden", (2, 3), "ridge")
    assert after.tokens.tolist() == [5]
    assert after.numbers == before.numbers


def rewrite(path: Path, tensors: dict[str, Tensor], **changes: object) -> None:
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["mediator_router"])
    about.update(changes)
    save_file(load_file(path) | tensors, path, metadata={"mediator_router": json.dumps(about)})


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        ({"weight": torch.zeros(3, WIDTH)}, {}, "weight must be"),
        ({"weight": torch.zeros(2, WIDTH, dtype=torch.float64)}, {}, "weight must be"),
        ({"bias": torch.full((2,), math.nan)}, {}, "not finite"),
        ({"more": torch.zeros(1)}, {}, "not expected: more"),
        ({}, {"experts": ["a", "c"]}, "features.b, features.c"),
        ({}, {"experts": ["a", "a"]}, "different experts"),
        ({}, {"kind": "response"}, "kind 'calibrated'"),
        ({}, {"format_version": 2}, "router format 1 required, got 2"),
        ({}, {"head": "tree"}, "'head' must be one of"),
        ({}, {"layers": [3]}, "must be a list of 2, got"),
        ({}, {"layers": [3, "4"]}, "'layers' must be a whole number, got '4'"),
        ({}, {"seed": -1}, "'seed' must be a whole number, got -1"),
        ({}, {"numbers": {"temperature": 1}}, "must be a finite number"),
    ],
)
def test_an_inconsistent_file_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], changes: dict[str, object], message: str
) -> None:
    path = tmp_path / "router.safetensors"
    router("a", "b").save(path)
    rewrite(path, tensors, **changes)
    with pytest.raises(ArtifactError, match=message):
        CalibratedRouter.load(path)


def test_a_router_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "router.safetensors"
    router("a", "b").save(path)
    before = path.read_bytes()
    with pytest.raises(OutputError, match="gone"):
        router("a", "b").save(tmp_path / "gone" / "router.safetensors")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["router.safetensors"]


@settings(max_examples=10)
@given(st.floats(0.2, 8.0), st.integers(0, 99))
def test_the_fitted_temperature_is_the_one_that_made_the_labels(true: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3000, 3, generator=generator) * true * 2
    labels = torch.multinomial((scores / true).softmax(dim=1), 1, generator=generator)[:, 0]
    assert fit_temperature(scores, labels) == pytest.approx(true, rel=0.15)


def test_perfect_scores_still_have_a_temperature() -> None:
    scores = torch.eye(3).repeat(10, 1)
    temperature = fit_temperature(scores, torch.arange(3).repeat(10))
    assert 0 < temperature < 1


def test_calibration_error_of_known_bins() -> None:
    probabilities = torch.tensor([[0.9, 0.1]] * 10 + [[0.4, 0.6]] * 10)
    truth = torch.tensor([0] * 9 + [1] + [1] * 3 + [0] * 7)
    assert expected_calibration_error(probabilities, truth) == pytest.approx(0.15, abs=1e-6)
    confidence, choice = probabilities.max(dim=1)
    sure, unsure = reversed(reliability(confidence, choice == truth))
    assert sure == (10, pytest.approx(0.9), 0.9)
    assert unsure == (10, pytest.approx(0.6), 0.3)


def test_mean_embedding_leaves_out_padding_and_excluded_tokens() -> None:
    table = torch.arange(12.0).reshape(6, 2)
    ids, mask = (
        torch.tensor([[0, 1, 2, 3], [5, 1, 4, 4]]),
        torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]),
    )
    got = mean_embedding(ids, mask, table, torch.tensor([1]))
    torch.testing.assert_close(got, torch.stack([table[[2, 3]].mean(0), table[[5, 4, 4]].mean(0)]))


def test_a_prompt_of_excluded_tokens_alone_is_their_mean() -> None:
    table = torch.arange(6.0).reshape(3, 2)
    got = mean_embedding(torch.tensor([[0, 1]]), torch.ones(1, 2), table, torch.tensor([0, 1]))
    torch.testing.assert_close(got, table[:2].mean(0, keepdim=True))


def test_the_mean_state_ignores_tokens_that_do_not_count() -> None:
    hidden = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    got = mean_state(hidden, torch.tensor([[False, True, True]]))
    torch.testing.assert_close(got, hidden[:, 1:].mean(dim=1))


def test_each_part_of_standardized_features_has_length_one() -> None:
    x = torch.tensor([[4.0, 1.0, 7.0, 9.0]])
    got = standardized(x, torch.tensor([1.0, 1, 7, 1]), torch.tensor([1.0, 2, 1, 4]), 2)
    torch.testing.assert_close(got, torch.tensor([[1.0, 0, 0, 1]]))


def test_a_feature_that_never_varies_does_not_drown_the_others() -> None:
    features = {
        name: torch.cat([x, torch.ones(20, 1)], dim=1) for name, x in clouds("a", "b").items()
    }
    odd = torch.cat([cloud(1, 1, seed=3), torch.tensor([[1.2]])], dim=1)
    decision = fit(features, "embedding").router.decide(odd)
    assert decision.weights.argmax() == 1


def test_hidden_layers_are_at_two_and_four_fifths_and_exist_in_the_smallest_model() -> None:
    assert [hidden_layers(n) for n in (1, 2, 30)] == [(1, 1), (1, 2), (12, 24)]


def test_shared_tokens_are_those_of_every_prompt() -> None:
    prompts = {"a": [[1, 2, 3], [1, 3, 4]], "b": [[3, 1]]}
    assert shared_tokens(prompts).tolist() == [1, 3]
    features = embedding_features(prompts, torch.eye(5), shared_tokens(prompts))
    assert [x.shape for x in features.values()] == [(2, 5), (1, 5)]
    assert features["a"].argmax(dim=1).tolist() == [2, 4]


@pytest.mark.parametrize("head", HEADS)
def test_prompts_that_are_all_alike_still_give_finite_decisions(head: Head) -> None:
    same = {name: torch.eye(3)[i].repeat(6, 1) for i, name in enumerate("abc")}
    decision = fit(same, "embedding", head=head).router.decide(torch.eye(3))
    assert decision.weights.argmax(dim=1).tolist() == [0, 1, 2]
    assert bool(decision.ood.isfinite().all())


def test_requests_like_the_background_are_farther_than_without_it() -> None:
    general = cloud(9, 30, noise=1.0)
    requests = {"task": cloud(0, 50, seed=7), "general": cloud(9, 50, seed=7, noise=1.0)}
    gaps = []
    for background in (None, general):
        fitted = fit(clouds("a", "b", "c"), "embedding", background=background).router
        misfit = {k: fitted.measure(x)[1].mean() for k, x in requests.items()}
        gaps.append(float(misfit["general"] - misfit["task"]))
    assert gaps[1] > 1.3 * gaps[0]


def test_requests_far_from_all_experts_are_told_from_held_out_prompts() -> None:
    features = {name: cloud(center) for center, name in enumerate(("math", "code"))}
    elsewhere = torch.cat([cloud(center, count=2) for center in range(10, 30)])
    figures = fit(features, "embedding", background=elsewhere).figures
    assert figures["ood_auroc"] > 0.95
    assert figures["ood_requests"] == 40
    same = torch.cat([cloud(center, seed=2) for center in (0, 1)])
    assert fit(features, "embedding", background=same).figures["ood_auroc"] < 0.8
    assert fit(features, "embedding").figures["ood_auroc"] is None


def test_auroc_counts_pairs_and_halves_ties() -> None:
    inside, outside = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 3.0])
    assert auroc(inside, outside) == pytest.approx((1.5 + 3) / 6)


def test_background_that_an_expert_claims_is_left_out() -> None:
    features = clouds("a", "b", "c")
    with_claimed = fit(features, "embedding", background=cloud(0, 30, seed=8)).router
    without = fit(features, "embedding").router
    assert torch.equal(with_claimed.fit_weight, without.fit_weight)
    assert with_claimed.numbers == without.numbers


def test_the_background_is_kept_when_experts_come_and_go() -> None:
    first = fit(clouds("a", "b"), "embedding", background=cloud(9, 30)).router
    later = add(first, "c", cloud(2)).router
    assert torch.equal(later.background, first.background)
