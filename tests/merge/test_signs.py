import pytest
import torch

from mergekit_mediator.delta.chunks import CHUNK
from mergekit_mediator.merge.signs import PackedSigns, Signs


@pytest.mark.parametrize("numel", [0, 1, 7, 64, CHUNK + 3])
def test_both_forms_count_what_two_experts_changed_and_where_they_disagree(numel):
    generator = torch.Generator().manual_seed(numel)
    taus = torch.randint(-2, 3, (3, numel), generator=generator).float()
    packed, plain = PackedSigns(numel), Signs(numel, "cpu")
    for tau in taus:
        packed.note(tau, 2.0)
        plain.note(tau, 2.0)
    large = taus.abs() >= 2
    shared = large.sum(0) >= 2
    opposed = (taus >= 2).any(0) & (taus <= -2).any(0)
    assert packed.counts() == plain.counts() == (int(shared.sum()), int(opposed.sum()))
