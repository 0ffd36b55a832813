from dataclasses import replace

import torch

from mergekit_mediator.delta.factors import Factors
from mergekit_mediator.delta.random_sign import encode_random_sign
from mergekit_mediator.delta.sparse import encode


def test_to_moves_every_tensor_and_changes_nothing_else():
    factors = Factors(torch.ones(4, 1), torch.ones(3, 1), torch.ones(1))
    stored = encode(torch.ones(4, 3), torch.zeros(4, 3), 0.5, "int8")
    stored = replace(stored, shift=0.25, share=0.5, factors=factors)
    moved = stored.to(torch.device("meta"))
    parts = (moved.factors.left, moved.factors.right, moved.factors.scales)
    assert {part.device.type for part in (moved.positions, moved.codes, *parts)} == {"meta"}
    tensors = {"positions": stored.positions, "codes": stored.codes, "factors": factors}
    assert replace(moved, **tensors) == stored


def test_random_signs_without_their_zeros_make_the_same_change():
    dense = torch.zeros(64, 96)
    expert = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    stored = encode_random_sign(expert, dense, 0.5)
    smaller = stored.without_zeros()
    assert smaller.positions.numel() < stored.positions.numel() / 2
    assert smaller.codes.all()
    assert torch.equal(smaller.change(dense), stored.change(dense))


def test_other_forms_hold_no_place_for_nothing():
    expert = torch.eye(8)
    for values in ("exact", "int8"):
        stored = encode(expert, torch.ones(8, 8), 1.0, values)
        assert stored.without_zeros() is stored
