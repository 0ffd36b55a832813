from dataclasses import replace

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from mergekit_mediator.delta.random_sign import encode_random_sign, random_positions
from mergekit_mediator.errors import InputError
from mergekit_mediator.store.codec import decode_bytes, encode_bytes


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@hypothesis.given(st.integers(1, 5000), st.data())
def test_one_coordinate_is_chosen_of_each_run(numel, data):
    count = data.draw(st.integers(0, numel))
    positions = random_positions(numel, count).tolist()
    begins = [numel * k // count for k in range(count + 1)] if count else []
    assert len(positions) == count
    for k, position in enumerate(positions):
        assert begins[k] <= position < begins[k + 1]
    assert positions == sorted(set(positions))
    assert all(0 <= position < numel for position in positions)


def test_the_coordinates_are_those_of_every_other_machine():
    assert random_positions(1000, 8).tolist() == [110, 178, 253, 496, 513, 665, 771, 971]
    assert random_positions(12, 12).tolist() == list(range(12))


def test_no_column_of_a_matrix_is_preferred():
    columns = random_positions(4096 * 64, 4096 * 8) % 64
    counts = np.bincount(columns.numpy(), minlength=64)
    assert counts.min() > 350
    assert counts.max() < 700


def test_runs_of_a_weight_too_large_for_a_product_of_64_bits_still_fit():
    numel = 2**40
    last = random_positions(numel, 3)
    assert last.dtype == torch.int64
    assert [int(x) // (numel // 3 + 1) for x in last] == [0, 1, 2]


def test_the_mean_of_many_stored_forms_is_the_difference():
    """Places follow from the number of coordinates, so rows of one matrix are as many draws of one row."""
    row = 0.01 * torch.linspace(-2.5, 2.5, 100)
    delta = row.repeat(20_000, 1)
    dense = torch.zeros_like(delta)
    stored = encode_random_sign(delta, dense, 0.25)
    found = replace(stored, factors=None).change(dense).mean(0)
    left = row - stored.factors.product().mean(0) if stored.factors else row
    assert float((found - left).abs().max()) < 0.05 * float(row.abs().max())


def test_every_direction_is_kept_but_for_noise():
    """A direction of 1% of the change's energy is found in the stored form, as long as it was."""
    left, right = drawn(400, 1, seed=2), drawn(1, 500, seed=3)
    direction = left @ right / (left.norm() * right.norm())
    noise = drawn(400, 500, seed=4)
    delta = noise + 0.1 * noise.norm() * direction
    stored = encode_random_sign(delta, torch.zeros_like(delta), 0.3).change(torch.zeros_like(delta))
    kept = float((stored * direction).sum() / (delta * direction).sum())
    assert kept == pytest.approx(1, abs=0.1)


def test_unchanged_numbers_stay_unchanged_beside_others():
    delta = drawn(50, 60)
    delta[:, ::3] = 0
    difference = encode_random_sign(delta, torch.zeros_like(delta), 1.0).change(delta)
    assert not difference[delta == 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_stored_weight_survives_its_file(dtype):
    dense = drawn(33, 70).to(dtype)
    expert = (dense.float() + 0.05 * drawn(33, 70, seed=1)).to(dtype)
    expert[5, :20] = dense[5, :20]  # a code of 0 has a place, too
    stored = encode_random_sign(expert, dense, 0.2)
    content, description = encode_bytes(stored, dense)
    back = decode_bytes(content, description, "here", dense)
    assert torch.equal(back.positions, stored.positions)
    assert torch.equal(back.codes, stored.codes)
    assert (back.scale, back.values) == (stored.scale, "random_sign")


def test_a_place_takes_little_more_than_a_bit():
    dense = torch.zeros(512, 512)
    stored = encode_random_sign(drawn(512, 512), dense, 0.1)
    content, description = encode_bytes(stored, dense)
    assert description.gaps == 0
    assert 8 * (content.numel() - 512) < 1.35 * stored.positions.numel()


def test_vectors_are_kept_whole():
    dense = drawn(300)
    expert = dense + drawn(300, seed=1)
    stored = encode_random_sign(expert, dense, 0.01)
    assert stored.values == "exact"
    assert torch.equal(stored.weights(dense[stored.positions]), expert[stored.positions])
    assert stored.positions.numel() == 300


def test_few_changed_coordinates_are_kept_exactly():
    dense = drawn(100, 100)
    expert = dense.clone()
    expert[7, :40] += 1
    stored = encode_random_sign(expert, dense, 0.1)
    assert stored.values == "exact"
    assert stored.positions.tolist() == list(range(700, 740))


def test_equal_weights_store_nothing():
    dense = drawn(20, 30)
    assert encode_random_sign(dense, dense, 0.5).positions.numel() == 0


def test_a_number_that_is_not_finite_is_refused():
    dense = drawn(20, 30)
    expert = dense.clone()
    expert[3, 4] = torch.inf
    with pytest.raises(InputError, match="random_sign values require finite weights"):
        encode_random_sign(expert, dense, 0.5)


def test_a_component_that_makes_most_of_the_noise_is_stored_as_factors():
    left, right = drawn(300, 1, seed=2), drawn(1, 400, seed=3)
    delta = drawn(300, 400) + 2 * left @ right
    dense = torch.zeros_like(delta)
    stored = encode_random_sign(delta, dense, 0.1)
    assert stored.factors is not None
    assert stored.factors.rank == 1
    assert (
        torch.nn.functional.cosine_similarity(
            stored.factors.product().flatten(), (left @ right).flatten(), dim=0
        )
        > 0.99
    )
    error = float((stored.change(dense) - delta).norm() / drawn(300, 400).norm())
    assert error < 5  # √(2.4 / 0.1 − 1) is 4.8: the noise of what is left, 3 · 0.8 a place
    content, description = encode_bytes(stored)
    back = decode_bytes(content, description, "here")
    assert torch.equal(back.change(dense), stored.change(dense))


def test_a_change_without_large_components_is_signs_alone():
    delta = drawn(300, 400)
    assert encode_random_sign(delta, torch.zeros_like(delta), 0.1).factors is None


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_a_change_of_few_numbers_is_met_on_the_mean(density):
    """Most numbers are zero, so that the others are large beside the root mean square of all."""
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(256, 1024, generator=generator)
    change *= torch.rand(256, 1024, generator=generator) < 0.12
    dense = torch.zeros_like(change)
    stored = encode_random_sign(change, dense, density).change(dense)
    assert float((stored * change).sum() / change.square().sum()) == pytest.approx(1, abs=0.06)
