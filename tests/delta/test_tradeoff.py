import math

import numpy as np
import pytest
import torch

from mergekit_mediator.delta.approximate import approximate
from mergekit_mediator.delta.mixing import mix_
from mergekit_mediator.delta.tradeoff import SLOPES, slope_for, tradeoff
from mergekit_mediator.errors import ConfigError
from mergekit_mediator.store.codec import encode_bytes


def weights():
    """Differences with a decaying spectrum, like those of fine-tunes, and a vector."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for out, width in [(512, 512), (512, 1024)]:
        left = torch.randn(out, 128, generator=generator)
        right = torch.randn(128, width, generator=generator)
        decay = torch.arange(1, 129) ** -1.0
        noise = torch.randn(out, width, generator=generator)
        result.append(1e-3 * ((left * decay) @ right / 3 + 0.5 * noise))
    return [*result, 1e-3 * torch.randn(512, generator=generator)]


@pytest.fixture(scope="module")
def costs():
    return sum(tradeoff(weight) for weight in weights())


@pytest.mark.parametrize("bits", [0.1, 0.4, 2.0])
def test_an_expert_takes_about_the_bits_that_were_asked_for(costs, bits):
    numel = sum(weight.numel() for weight in weights())
    slope = slope_for(costs[0], numel, bits)
    stored = [approximate(weight, slope, torch.bfloat16) for weight in weights()]
    taken = sum(8 * encode_bytes(tensor)[0].numel() for tensor in stored)
    assert taken / numel == pytest.approx(bits, rel=0.1)


def test_a_budget_below_the_vectors_is_refused():
    vector = torch.randn(1000)
    with pytest.raises(
        ConfigError, match=r"bits: at least 6\.5 required for these weights, got 0\.1"
    ):
        slope_for(tradeoff(vector)[0], 1000, 0.1)


def test_a_budget_above_everything_takes_the_smallest_slope():
    assert slope_for(tradeoff(torch.zeros(4, 4))[0], 16, 8.0) == SLOPES[-1]


@pytest.mark.parametrize("bits", [0.1, 0.4, 2.0])
def test_the_error_that_is_left_is_about_the_predicted_one(costs, bits):
    numel = sum(weight.numel() for weight in weights())
    slope = slope_for(costs[0], numel, bits)
    left = 0.0
    for weight in weights():
        rebuilt = torch.zeros_like(weight)
        mix_(rebuilt, [(1.0, approximate(weight, slope, torch.float32))])
        left += float((rebuilt - weight).square().sum())
    # slopes descend by half octaves; logarithms are close to a line between two of them
    place = -2 * math.log2(slope)
    predicted = np.exp(np.interp(place, range(len(SLOPES)), costs[1].clamp_min(1e-300).log()))
    assert left == pytest.approx(predicted, rel=0.05)


def test_a_change_of_low_rank_takes_no_more_bits_than_its_factors():
    """Float32 rounds a product, and this noise is in every number."""
    generator = torch.Generator().manual_seed(0)
    base = 0.05 * torch.randn(192, 160, generator=generator)
    thin = [torch.randn(n, 4, generator=generator) for n in (192, 160)]
    difference = (base + 1e-4 * thin[0] @ thin[1].T) - base
    costs = tradeoff(difference)
    for asked in (0.5, 4.0):
        slope = slope_for(costs[0], difference.numel(), asked)
        stored = approximate(difference, slope, torch.bfloat16)
        assert not stored.positions.numel()
        bits = 8 * encode_bytes(stored)[0].numel() / difference.numel()
        assert bits < 1.02 * min(asked, 0.6)
        error = float((stored.change(base) - difference).norm() / difference.norm())
        assert error < (0.3 if asked < 1 else 0.05)
    assert (costs[0].diff() >= 0).all()
    assert (costs[1].diff() <= 0).all()
