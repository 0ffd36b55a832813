from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_mediator.delta.factors import Factors
from mergekit_mediator.delta.kth_largest import count_kept
from mergekit_mediator.delta.mixing import mix_, restore_
from mergekit_mediator.delta.sparse import encode
from mergekit_mediator.delta.value_forms import VALUES
from mergekit_mediator.errors import InputError

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
DTYPES = st.sampled_from(list(BITS))
SHAPES = st.sampled_from([(), (0,), (1,), (7,), (3, 0), (1, 1), (5, 9), (2, 3, 4)])


def bits(weight):
    return weight.contiguous().view(BITS[weight.dtype])


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


@st.composite
def pairs(draw):
    """An expert and a dense expert with many equal coordinates, ties, zeros of both signs."""
    shape, dtype = draw(SHAPES), draw(DTYPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dense = torch.randn(shape, generator=generator).to(dtype)
    steps = torch.randint(-3, 4, shape, generator=generator)
    expert = (dense.float() + 0.25 * steps).to(dtype)
    if draw(st.booleans()):
        expert = torch.where(steps == 1, torch.zeros_like(dense), expert)
        dense = torch.where(steps == 1, -torch.zeros_like(dense), dense)
    return expert, dense


def kept_by_sorting(expert, dense, density):
    """Positions of the largest |Δ|, the earlier one first among equals; unchanged bits never."""
    delta = (expert.float() - dense.float()).abs().reshape(-1).tolist()
    changed = (bits(expert) != bits(dense)).reshape(-1).tolist()
    order = sorted(range(len(delta)), key=lambda j: (-delta[j], j))
    k = count_kept(len(delta), density)
    kept = [j for j in order if changed[j]]
    # ties at a threshold of zero are only signs of zeros: they are kept all or none
    return sorted(j for j in kept[:k] if len(kept) <= k or delta[j] > 0)


@given(pairs(), st.floats(0.01, 1))
def test_encode_keeps_the_largest_differences(pair, density):
    stored = encode(*pair, density)
    assert stored.positions.tolist() == kept_by_sorting(*pair, density)


@given(pairs(), st.sampled_from(VALUES), st.floats(0.01, 1))
def test_a_stored_tensor_knows_the_shape_and_dtype_of_its_weight(pair, values, density):
    stored = encode(*pair, density, values)
    assert (stored.shape, stored.dtype) == (tuple(pair[0].shape), pair[0].dtype)
    assert stored.positions.dtype == torch.int32
    assert stored.positions.numel() == stored.codes.numel()


@given(pairs())
def test_an_exact_expert_at_density_one_gives_its_bits_back(pair):
    expert, dense = pair
    weight = dense.clone()
    mix_(weight, [(1.0, encode(expert, dense, 1.0))])
    assert same_bits(weight, expert)


@given(pairs(), st.floats(0.01, 1))
def test_an_exact_expert_gives_its_bits_at_the_kept_coordinates_only(pair, density):
    expert, dense = pair
    stored = encode(expert, dense, density)
    weight = dense.clone()
    mix_(weight, [(1.0, stored)])
    kept = torch.zeros(dense.numel(), dtype=torch.bool)
    kept[stored.positions] = True
    expected = torch.where(kept.view(dense.shape), expert, dense)
    assert same_bits(weight, expected)


@given(pairs(), st.lists(st.tuples(st.floats(0, 1), st.sampled_from(VALUES)), max_size=4))
def test_a_mixture_adds_the_weighted_differences_and_rounds_once(pair, choices):
    expert, dense = pair
    others = [(expert.float() * (i + 1)).to(expert.dtype) for i in range(len(choices))]
    parts = [
        (p, encode(e, dense, 0.5, values)) for e, (p, values) in zip(others, choices, strict=True)
    ]
    expected = dense.reshape(-1).float()
    for p, stored in parts:
        delta = torch.zeros_like(expected)
        delta[stored.positions] = stored.difference(dense.reshape(-1)[stored.positions])
        expected = expected + p * delta
    weight = dense.clone()
    mix_(weight, parts)
    if not (len(parts) == 1 and parts[0][0] == 1.0):
        assert torch.equal(weight, expected.to(dense.dtype).view(dense.shape))


@given(pairs(), st.lists(st.tuples(st.floats(0, 1), st.sampled_from(VALUES)), max_size=3))
def test_restore_gives_the_dense_bits_back(pair, choices):
    expert, dense = pair
    weight = dense.clone()
    for p, values in choices:
        stored = encode(expert, dense, 0.7, values)
        displaced = mix_(weight, [(p, stored), (1 - p, stored)])
        restore_(weight, displaced)
        assert same_bits(weight, dense)


@given(pairs())
def test_identical_weights_keep_nothing(pair):
    _, dense = pair
    for values in VALUES:
        stored = encode(dense, dense, 1.0, values)
        assert stored.positions.numel() == 0
        weight = dense.clone()
        mix_(weight, [(1.0, stored)])
        assert same_bits(weight, dense)


def test_int8_differences_are_within_half_a_step():
    dense = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    expert = dense + torch.linspace(-1, 1, 4000)
    stored = encode(expert, dense, 1.0, "int8")
    error = stored.difference(dense[stored.positions]) - (expert - dense)[stored.positions]
    assert float(error.abs().max()) <= 0.501 / 127
    assert int(stored.codes.abs().max()) == 127


def test_sign_keeps_the_sign_and_the_mean_magnitude():
    dense = torch.zeros(4)
    stored = encode(torch.tensor([1.0, -3.0, 0.0, 2.0]), dense, 1.0, "sign")
    assert stored.difference(dense[stored.positions]).tolist() == [2.0, -2.0, 2.0]


def test_int4_loses_less_than_scaling_by_the_largest_difference():
    generator = torch.Generator().manual_seed(0)
    dense, delta = torch.zeros(5000), torch.randn(5000, generator=generator)
    delta[0] = 12.0
    stored = encode(delta, dense, 1.0, "int4")
    plain = (delta / (12 / 7)).round() * (12 / 7)
    restored = torch.zeros(5000)
    restored[stored.positions] = stored.difference(dense)
    assert (restored - delta).square().sum() < 0.5 * (plain - delta).square().sum()


def test_infinite_differences_are_the_largest():
    dense = torch.zeros(4)
    expert = torch.tensor([1.0, torch.inf, 2.0, torch.nan])
    assert encode(expert, dense, 0.5).positions.tolist() == [1, 3]


@pytest.mark.parametrize("values", ["int8", "int4", "sign"])
def test_weights_that_are_not_finite_cannot_be_quantised(values):
    with pytest.raises(InputError, match=rf"{values} .* finite"):
        encode(torch.tensor([1.0, torch.nan]), torch.zeros(2), 1.0, values)


def test_a_large_weight_keeps_the_exact_count():
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(700, 600, generator=generator).bfloat16()
    expert = (dense.float() + 0.01 * torch.randn(700, 600, generator=generator)).bfloat16()
    stored = encode(expert, dense, 0.1)
    assert stored.positions.numel() == 42_000
    assert stored.positions.tolist() == kept_by_sorting(expert, dense, 0.1)


def test_to_moves_every_tensor_and_changes_nothing_else():
    factors = Factors(torch.ones(4, 1), torch.ones(3, 1), torch.ones(1))
    stored = encode(torch.ones(4, 3), torch.zeros(4, 3), 0.5, "int8")
    stored = replace(stored, shift=0.25, share=0.5, factors=factors)
    moved = stored.to(torch.device("meta"))
    parts = (moved.factors.left, moved.factors.right, moved.factors.scales)
    assert {part.device.type for part in (moved.positions, moved.codes, *parts)} == {"meta"}
    tensors = {"positions": stored.positions, "codes": stored.codes, "factors": factors}
    assert replace(moved, **tensors) == stored
