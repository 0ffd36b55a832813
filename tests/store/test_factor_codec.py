import pytest
import torch

from mergekit_mediator.delta.factors import Factors
from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.store.codec import decode_bytes, encode_bytes


def low_rank(out, width, largest):
    """Factors of int8 codes, each column up to its own largest one."""
    generator = torch.Generator().manual_seed(0)
    columns = []
    for size in largest:
        column = torch.randint(-size, size + 1, (out + width, 1), generator=generator)
        column[0] = size
        columns.append(column.to(torch.int8))
    numbers = torch.cat(columns, dim=1)
    scales = torch.rand(len(largest), generator=generator) + 0.1
    factors = Factors(numbers[:out].contiguous(), numbers[out:].contiguous(), scales)
    return StoredWeight.of_factors((out, width), torch.bfloat16, factors)


@pytest.mark.parametrize(
    ("largest", "paired"),
    [([5, 3, 7], 3), ([90, 7], 1), ([3, 8], 0), ([127, 3, 9, 2, 2], 2), ([0], 1)],
)
@pytest.mark.parametrize("shape", [(9, 6), (8, 6)])
def test_trailing_columns_of_small_codes_are_paired_and_come_back(largest, paired, shape):
    stored = low_rank(*shape, largest)
    stream, description = encode_bytes(stored)
    assert description.factors.paired == paired
    again = decode_bytes(stream, description, "here").factors
    assert torch.equal(again.left, stored.factors.left)
    assert torch.equal(again.right, stored.factors.right)
    assert torch.equal(again.scales, stored.factors.scales)


def test_pairs_of_gaussian_codes_take_little_more_than_their_entropy():
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(2000, 16, generator=generator).round().to(torch.int8)
    factors = Factors(numbers[:1200].contiguous(), numbers[1200:].contiguous(), torch.ones(16))
    _, description = encode_bytes(StoredWeight.of_factors((1200, 800), torch.bfloat16, factors))
    _, counts = numbers.unique(return_counts=True)
    shares = counts / numbers.numel()
    entropy = float(-(shares * shares.log2()).sum())
    assert 8 * sum(description.factors.sizes[:-1]) / numbers.numel() < 1.03 * entropy
