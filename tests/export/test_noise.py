"""The directions of a change that stand out of the noise of its random signs."""

import pytest
import torch

from mergekit_mediator.delta.random_sign import encode_random_sign
from mergekit_mediator.export.experts import Change
from mergekit_mediator.export.low_rank import low_rank
from mergekit_mediator.export.noise import directions_above_noise


def change_of(rank, size, density=0.5, shape=(192, 256)):
    """Signs of a change of so many equal directions, `size` times the norm of the noise around them."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, rank, generator=generator) for n in shape)
    around = torch.randn(shape, generator=generator)
    planted = torch.linalg.qr(left).Q @ torch.linalg.qr(right).Q.T * shape[0] ** 0.5
    dense = torch.zeros(shape)
    stored = encode_random_sign(size * planted + around, dense, density)
    assert stored.values == "random_sign"
    return Change("w", shape, ((1.0, stored),)), dense


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_directions_that_are_larger_than_the_noise_are_counted(rank):
    change, dense = change_of(rank, size=14.0)
    assert directions_above_noise(change, low_rank(change, dense, 64)) == rank


def test_directions_below_the_noise_are_not_counted():
    change, dense = change_of(12, size=1.0, density=0.1)
    assert directions_above_noise(change, low_rank(change, dense, 64)) == 0
