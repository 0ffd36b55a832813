import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_mediator.delta.approximate import NORM_POWER, approximate
from mergekit_mediator.delta.factors import Factors
from mergekit_mediator.delta.mixing import mix_, restore_
from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.store.codec import decode_bytes, encode_bytes

SHAPES = st.sampled_from([(), (0,), (1,), (9,), (0, 4), (1, 5), (5, 1), (12, 20), (3, 4, 6)])


def rebuilt(stored: StoredWeight) -> torch.Tensor:
    weight = torch.zeros(stored.shape)
    mix_(weight, [(1.0, stored)])
    return weight


def difference(*shape, rank=2, noise=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(shape[0], rank, generator=generator)
    right = torch.randn(rank, shape[1], generator=generator)
    return left @ right + noise * torch.randn(*shape, generator=generator)


@given(SHAPES, st.floats(1e-6, 10), st.integers(0, 2**31))
@settings(max_examples=60)
def test_any_shape_can_be_approximated(shape, slope, seed):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    stored = approximate(delta, slope, torch.float32)
    assert stored.shape == tuple(shape)
    error = (rebuilt(stored) - delta).square().sum()
    assert error <= delta.square().sum() * 1.001


def test_a_smaller_slope_brings_a_smaller_error():
    delta = difference(80, 60)
    errors = [
        float((rebuilt(approximate(delta, slope, torch.float32)) - delta).square().sum())
        for slope in (1e2, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == float(delta.square().sum())
    assert errors[-1] < 1e-3 * errors[0]


def test_the_common_part_goes_to_factors_and_outliers_to_the_sparse_part():
    delta = difference(80, 60, rank=2, noise=0.01)
    delta[7, 5] += 9.0
    stored = approximate(delta, 2.0, torch.float32)
    assert stored.factors is not None
    assert stored.factors.rank == 2
    assert 7 * 60 + 5 in stored.positions.tolist()
    assert stored.positions.numel() < 100


def test_vectors_are_kept_finely_whatever_the_slope():
    delta = torch.randn(500, generator=torch.Generator().manual_seed(0))
    stored = approximate(delta, 1e9, torch.float32)
    assert stored.factors is None
    assert (rebuilt(stored) - delta).abs().max() < 0.66 / 16 * 1.1


def test_unchanged_weights_keep_nothing():
    for shape in [(7,), (6, 5)]:
        stored = approximate(torch.zeros(shape), 1.0, torch.float32)
        assert stored.positions.numel() == 0
        assert stored.factors is None


def test_a_code_decodes_to_the_mean_of_its_weights():
    delta = torch.zeros(1000, 1)
    delta[:300, 0] = torch.linspace(1.0, 1.2, 300)
    stored = approximate(delta, 0.25, torch.float32)  # a step of 1
    assert torch.allclose(rebuilt(stored).sum(), delta.sum(), rtol=1e-5)


def test_experts_with_shares_are_mixed_as_if_added_to_the_base():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(30, 20, generator=generator)
    shares, weights = (0.25, 0.75), (0.9, 0.3)
    taus = [difference(30, 20, noise=0.3, seed=seed) for seed in (1, 2)]
    dense = base + sum(w * tau for w, tau in zip(shares, taus, strict=True))
    stored = [
        approximate(tau, 1e-9, torch.float32, share)
        for tau, share in zip(taus, shares, strict=True)
    ]
    # a mixture of total p moves the weight p of the way from the dense expert to base and experts
    total = sum(weights)
    expected = (1 - total) * dense + total * base
    expected += sum(p * tau for p, tau in zip(weights, taus, strict=True))
    weight = dense.clone()
    displaced = mix_(
        weight, [(s.coefficient(p, total), s) for p, s in zip(weights, stored, strict=True)]
    )
    assert torch.allclose(weight, expected, atol=1e-3)
    restore_(weight, displaced)
    assert torch.equal(weight, dense)


def test_one_expert_with_a_share_is_the_base_and_its_difference():
    base, tau = torch.randn(30, 20), difference(30, 20, noise=0.3)
    weight = base + 0.5 * tau
    stored = approximate(tau, 1e-9, torch.float32, 0.5)
    mix_(weight, [(stored.coefficient(1.0, 1.0), stored)])
    assert torch.allclose(weight, base + tau, atol=1e-3)


def test_an_expert_that_changes_nothing_here_counts_in_the_total():
    base, tau = torch.randn(30, 20), difference(30, 20, noise=0.3)
    weight = base + 0.5 * tau
    stored = approximate(tau, 1e-9, torch.float32, 0.5)
    mix_(weight, [(stored.coefficient(0.0, 1.0), stored)])
    assert torch.allclose(weight, base, atol=1e-3)


def test_an_adapter_is_stored_and_applied_exactly():
    generator = torch.Generator().manual_seed(0)
    lora_b = torch.randn(30, 3, generator=generator).bfloat16()
    lora_a = torch.randn(3, 20, generator=generator)
    factors = Factors.of_adapter(lora_b, lora_a, 4 / 3)
    stored = StoredWeight.of_factors((30, 20), torch.float32, factors, share=0.25)
    stream, description = encode_bytes(stored)
    weight = torch.zeros(30, 20)
    stored = decode_bytes(stream, description, "here")
    mix_(weight, [(stored.coefficient(1.0, 1.0), stored)])
    assert torch.allclose(weight, 0.75 * 4 / 3 * lora_b.float() @ lora_a, atol=1e-5)


@pytest.mark.parametrize("slope", [3e-2, 1e-2])
def test_an_approximation_grows_by_a_power_of_the_part_that_it_lacks(slope):
    generator = torch.Generator().manual_seed(0)
    low_rank = torch.randn(80, 4, generator=generator) @ torch.randn(4, 60, generator=generator)
    delta = 0.1 * (low_rank + torch.randn(80, 60, generator=generator))
    kept = rebuilt(approximate(delta, slope, torch.float32))
    plain = (
        kept * (kept * delta).sum() / kept.square().sum()
    )  # the multiple nearest to the difference
    assert float(plain.norm()) < 0.98 * float(delta.norm())
    strength = float(kept.norm() / plain.norm())
    assert strength == pytest.approx(float(delta.norm() / plain.norm()) ** NORM_POWER, rel=0.01)


@pytest.mark.parametrize("slope", [3e-2, 1e-2])
def test_an_approximation_of_norm_power_0_is_nearest_to_the_difference(slope):
    delta = 0.1 * difference(80, 60, rank=4, noise=1.0)
    approximation = rebuilt(approximate(delta, slope, torch.float32, norm_power=0.0))
    nearest = float((approximation * delta).sum() / approximation.square().sum())
    assert nearest == pytest.approx(1, abs=0.01)


def test_an_approximation_that_lacks_nothing_does_not_grow():
    delta = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    kept = rebuilt(approximate(delta, 1e-8, torch.float32))
    assert float((kept * delta).sum() / kept.square().sum()) == pytest.approx(1, abs=1e-4)
