import torch
from hypothesis import given
from hypothesis import strategies as st
from weight_pairs import pairs, same_bits

from mergekit_mediator.delta.mixing import mix_, restore_
from mergekit_mediator.delta.sparse import encode
from mergekit_mediator.delta.value_forms import VALUES


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
