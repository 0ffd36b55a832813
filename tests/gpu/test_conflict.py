"""The conflict between experts, and the order statistics below it, computed on the device."""

from dataclasses import astuple

import pytest
import torch

from mergekit_mediator.delta.kth_largest import kth_largest
from mergekit_mediator.merge.conflict import measure, task_vectors

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def weights(dtype, shape=(300, 1000)):
    """A base and three experts, of several chunks and with many ties in 16 bits."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator).to(dtype)
    changes = [0.05 * torch.randn(shape, generator=generator) for _ in range(3)]
    return base, [(base.float() + change).to(dtype) for change in changes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("denoise", [0.1, 1.0])
def test_conflict_is_that_of_the_processor(device, dtype, denoise):
    base, experts = weights(dtype)
    expected = measure(base, experts, denoise)
    found = measure(base, experts, denoise, str(device))
    assert (found.shared, found.opposed) == (expected.shared, expected.opposed)
    assert astuple(found) == pytest.approx(astuple(expected), rel=1e-4)


@pytest.mark.parametrize("denoise", [0.1, 1.0])
def test_conflict_of_weights_on_the_device_is_the_same(device, denoise):
    base, experts = weights(torch.bfloat16)
    there = measure(base, experts, denoise, str(device))
    placed = [expert.to(device) for expert in experts]
    found = measure(base.to(device), placed, denoise, str(device))
    assert astuple(found) == pytest.approx(astuple(there), rel=1e-6)


def test_numbers_that_are_not_finite_count_as_unchanged(device):
    base, experts = weights(torch.float32, (20, 30))
    experts[0][3, 4], experts[1][5, 6] = torch.nan, torch.inf
    assert astuple(measure(base, experts, 1.0, str(device))) == pytest.approx(
        astuple(measure(base, experts, 1.0)), rel=1e-4
    )


def test_task_vectors_are_those_of_the_processor(device):
    base, experts = weights(torch.bfloat16, (20, 30))
    for found, expected in zip(
        task_vectors(base, experts, str(device)), task_vectors(base, experts), strict=True
    ):
        assert found.device.type == device.type
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("k", [1, 777, 150_000, 299_999])
@pytest.mark.parametrize("tied", [False, True])
def test_the_kth_largest_is_exact(device, k, tied):
    values = torch.rand(300_000, generator=torch.Generator().manual_seed(1))
    if tied:
        values = (8 * values).round() / 8
    placed = values.to(device)
    expected = float(values.sort(descending=True).values[k - 1])
    larger = int((values > expected).sum())
    assert kth_largest(placed.__getitem__, values.numel(), k) == (expected, larger)
