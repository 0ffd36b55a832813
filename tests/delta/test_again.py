import pytest
import torch
from weight_pairs import bits

from mergekit_mediator.delta.again import Adding, Overwriting
from mergekit_mediator.delta.approximate import approximate
from mergekit_mediator.delta.factors import Factors
from mergekit_mediator.delta.mixing import displace, mix_, restore_
from mergekit_mediator.delta.sparse import encode
from mergekit_mediator.delta.stored_weight import StoredWeight

OUT, WIDTH = 48, 40


def dense(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(OUT, WIDTH, generator=generator).to(dtype)


def stored(seed, slope=1e-4):
    """Low rank plus sparse; a smaller slope stores more."""
    generator = torch.Generator().manual_seed(seed)
    low_rank = torch.randn(OUT, 3, generator=generator) @ torch.randn(3, WIDTH, generator=generator)
    noise = torch.randn(OUT, WIDTH, generator=generator)
    return approximate(0.05 * low_rank + 0.02 * noise.pow(3), slope, torch.bfloat16, share=0.25)


def adapter(seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(size, 4, generator=generator).bfloat16() for size in (WIDTH, OUT))
    return StoredWeight.of_factors((OUT, WIDTH), torch.bfloat16, Factors.of_adapter(b, a.T, 0.1))


def mixed(weight, terms):
    """A weight with a mixture in place, and the dense expert's weights that it displaced."""
    saved = displace(weight, terms)
    mix_(weight, terms, saved)
    return saved


@pytest.mark.parametrize("experts", [1, 3])
def test_low_rank_plus_sparse_comes_back_as_it_was_mixed(experts):
    weight = dense()
    terms = [(1.0 if seed == 0 else -0.25, stored(seed)) for seed in range(experts)]
    saved = mixed(weight, terms)
    expected = weight.clone()
    step = Adding.of(weight, terms, saved)
    first = weight.clone()
    # sums in another order may round to the neighbour, and rarely do
    assert float((first != expected).float().mean()) < 0.01
    torch.testing.assert_close(first.float(), expected.float(), rtol=2**-7, atol=1e-3)
    sparse = torch.cat([s.positions for _, s in terms]).long()
    assert torch.equal(first.view(-1)[sparse], expected.view(-1)[sparse])
    for _ in range(3):
        restore_(weight, saved)
        step(weight)
        assert torch.equal(bits(weight), bits(first))


def test_the_factors_of_adapters_come_back_bit_for_bit():
    weight = dense()
    terms = [(1.0, adapter(0)), (-0.5, adapter(1))]
    saved = mixed(weight, terms)
    expected = weight.clone()
    Adding.of(weight, terms, saved)
    assert torch.equal(bits(weight), bits(expected))


def test_exact_values_are_overwritten_with_no_tensor_of_the_steps_own():
    weight = dense()
    exact = encode((weight.float() + 0.1).bfloat16(), weight, 0.2)
    step = Overwriting.of(weight, [(1.0, exact)])
    saved = mixed(weight, [(1.0, exact)])
    expected = weight.clone()
    restore_(weight, saved)
    step(weight)
    assert torch.equal(bits(weight), bits(expected))
    assert step.tensors == ()


@pytest.mark.parametrize("coefficient", [0.5, 1.0])
def test_a_step_is_not_overwriting_if_it_takes_arithmetic(coefficient):
    exact = encode((dense().float() + 0.1).bfloat16(), dense(), 0.2)
    terms = [(coefficient, exact)] if coefficient != 1 else [(1.0, stored(0))]
    assert Overwriting.of(dense(), terms) is None


def test_no_product_is_prepared_without_factors_or_in_another_dtype():
    weight = dense()
    exact = [(0.5, encode((weight.float() + 0.1).bfloat16(), weight, 0.2))]
    assert Adding.of(weight, exact, mixed(weight, exact)) is None
    terms, half = [(1.0, stored(0))], dense(torch.float16)
    saved = mixed(half, terms)
    before = half.clone()
    assert Adding.of(half, terms, saved) is None
    assert torch.equal(bits(half), bits(before))


def test_adapters_of_float32_beside_sparse_parts_are_not_prepared():
    weight = dense()
    a, b = torch.randn(WIDTH, 2), torch.randn(OUT, 2)
    wide = StoredWeight.of_factors(
        (OUT, WIDTH), torch.bfloat16, Factors.of_adapter(b, a.T.contiguous(), 0.1)
    )
    terms = [(1.0, wide), (1.0, stored(0))]
    assert Adding.of(weight, terms, mixed(weight, terms)) is None
