import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from weight_pairs import bits, pairs, same_bits

from mergekit_mediator.delta.kth_largest import count_kept
from mergekit_mediator.delta.mixing import mix_
from mergekit_mediator.delta.sparse import encode
from mergekit_mediator.delta.value_forms import VALUES
from mergekit_mediator.errors import InputError


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_encoding_changes_neither_the_expert_nor_the_dense_weight(dtype):
    expert, dense = torch.randn(2, 64, 64).to(dtype)
    before = expert.clone(), dense.clone()
    encode(expert, dense, 0.1)
    assert torch.equal(expert, before[0])
    assert torch.equal(dense, before[1])
