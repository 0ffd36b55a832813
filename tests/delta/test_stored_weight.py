from dataclasses import replace

import torch

from mergekit_mediator.delta.factors import Factors
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
