import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_mediator.delta.decomposition import decompose
from mergekit_mediator.delta.factor_steps import codes
from mergekit_mediator.delta.factors import Components, Factors


def matrix(out, width, rank=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(out, width, generator=generator)
    left = torch.randn(out, rank, generator=generator)
    return left @ torch.randn(rank, width, generator=generator)


def test_rank_counts_the_components_that_are_worth_their_numbers():
    values = torch.tensor([8.0, 4.0, 2.0, 1.0])
    components = Components(torch.eye(50, 4), values, torch.eye(50, 4), energy=85.0)
    # squares of 64, 16, 4 and 1 for a hundred numbers each; the coarsest steps pay from 0.9 slopes on
    assert [components.rank(s) for s in (0.73, 0.7, 0.15, 0.03, 0.01)] == [0, 1, 2, 3, 4]


def test_components_of_noise_are_not_worth_their_numbers():
    assert decompose(matrix(60, 60)).rank(1e-12) == 0


@pytest.mark.parametrize(("out", "width"), [(64, 96), (96, 64), (200, 50)])
def test_quantised_factors_keep_most_of_the_energy_of_their_components(out, width):
    full = matrix(out, width, rank=8)
    found = decompose(full)
    quantised = found.quantise(1e-3, full)
    assert quantised.rank == 8
    assert quantised.left.dtype == quantised.right.dtype == torch.int8
    left = (quantised.product() - full).square().sum() / full.square().sum()
    assert left < 0.2  # two factors in steps of one standard deviation: about 2/12 of it


def test_the_scales_of_quantised_factors_are_the_best_ones():
    full = matrix(40, 30, rank=4)
    quantised = decompose(full).quantise(1.0, full)
    best = (quantised.product() - full).square().sum()
    for k in range(4):
        for change in (0.99, 1.01):
            scales = quantised.scales.clone()
            scales[k] *= change
            worse = Factors(quantised.left, quantised.right, scales).product() - full
            assert worse.square().sum() > best


def test_stronger_components_are_kept_in_finer_steps():
    values = torch.tensor([16.0, 6.0, 3.0, 1.0])
    components = Components(torch.eye(50, 4), values, torch.eye(50, 4), energy=302.0)
    assert components.fineness(0.01).tolist() == [9, 6, 4, 1]
    assert components.fineness(0.08).tolist() == [6, 3, 1]


def test_large_entries_of_a_column_are_not_cut_off():
    spike = torch.zeros(20_000, 2)
    spike[0] = 1.0
    spike[1:] = 1e-3 * torch.randn(19_999, 2, generator=torch.Generator().manual_seed(0))
    quantised = decompose(spike).quantise(1e-9, spike)
    assert (quantised.product() - spike).abs()[0].max() < 0.05


def test_one_side_makes_up_for_part_of_the_rounding_of_the_other():
    full = matrix(96, 64, rank=12) + 0.1 * matrix(96, 64, seed=1)
    found = decompose(full)
    slope = float(found.values[11]) ** 2 / (4 * (96 + 64))
    quantised, chosen = found.quantise(slope, full), found.fineness(slope)
    a, b = (codes(side[:, : chosen.numel()], chosen).double() for side in (found.left, found.right))
    scales = torch.linalg.solve((a.T @ a) * (b.T @ b), (a * (full.double() @ b)).sum(0))
    refit, rounded = (
        float((full - product).square().sum())
        for product in (quantised.product(), (a * scales) @ b.T)
    )
    assert refit < 0.97 * rounded


def test_vectors_that_round_to_the_same_ones_are_no_obstacle():
    full = matrix(40, 30, rank=1)
    found = decompose(full)
    twice = Components(
        found.left[:, :1].repeat(1, 2),
        found.values[:1].repeat(2) / 2**0.5,
        found.right[:, :1].repeat(1, 2),
        found.energy,
    )
    quantised = twice.quantise(1e-9, full)
    assert quantised.rank == 2
    assert (quantised.product() - full).norm() < 0.05 * full.norm()


@given(
    *(st.integers(1, 9), st.integers(1, 9), st.integers(1, 30)),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_factors_of_an_adapter_are_exact_and_of_no_higher_rank_than_the_weight(
    out, width, rank, dtype
):
    lora_b, lora_a = matrix(out, rank).to(dtype), matrix(rank, width, seed=1).to(dtype)
    found = Factors.of_adapter(lora_b, lora_a, 0.75)
    assert found.rank == min(rank, out, width)
    assert (found.left.dtype, found.left.shape) == (found.right.dtype, (out, found.rank))
    if rank == found.rank:
        assert torch.equal(found.left, lora_b)
        assert torch.equal(found.right.T, lora_a)
    exact = lora_b.double() @ lora_a.double()
    kept = found.left.double() @ found.right.double().T
    assert torch.equal(kept.float(), exact.float())
    torch.testing.assert_close(found.product(), (0.75 * exact).float())
