import pytest
import torch

from mergekit_mediator.delta.factor_steps import BITS, KEPT, LEAST_SLOPES, codes, fineness

NUMBERS = 200_000


def unit(seed: int) -> torch.Tensor:
    vector = torch.randn(NUMBERS, 1, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm()


@pytest.mark.parametrize("fine", range(len(BITS)))
def test_bits_and_kept_energy_are_those_of_rounded_gaussian_vectors(fine):
    kept = 1.0
    for seed in (0, 1):
        vector = unit(seed)
        rounded = codes(vector, torch.tensor([fine])).to(torch.float64)
        kept *= float((vector.double() * rounded).sum() ** 2 / rounded.square().sum())
        share = torch.unique(rounded, return_counts=True)[1].double() / NUMBERS
        assert float(-(share * share.log2()).sum()) == pytest.approx(float(BITS[fine]), abs=0.01)
    assert kept == pytest.approx(float(KEPT[fine]), abs=0.003)


def test_no_other_fineness_saves_more_for_its_bits():
    squares = torch.logspace(-1, 3, 50, dtype=torch.float64)
    (chosen,) = fineness(squares, 100, torch.tensor([[0.01]], dtype=torch.float64))
    price = 0.01 * 100 * float(KEPT[2] / BITS[2])
    for square, found in zip(squares.tolist(), chosen.tolist(), strict=True):
        best = max(range(len(BITS)), key=lambda k, s=square: s * KEPT[k] - price * BITS[k])
        assert found == best
    assert chosen.tolist() == sorted(chosen.tolist())


def test_a_component_below_the_least_would_cost_more_than_it_saves():
    price = float(KEPT[2] / BITS[2])  # of a bit, at a slope of 1 and one number
    for square, worth in ((0.99 * LEAST_SLOPES, False), (1.01 * LEAST_SLOPES, True)):
        assert bool((square * KEPT > price * BITS).any()) is worth


def test_a_vector_with_few_large_entries_takes_larger_steps():
    spike = torch.full((10_000, 1), 1e-5)
    spike[0] = 1.0
    assert codes(spike, torch.tensor([10]))[0] == 127
