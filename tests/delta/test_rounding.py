import numpy as np
import pytest
import torch

from mergekit_mediator.delta.approximate import quantise_steps
from mergekit_mediator.delta.rounding import Sample


@pytest.mark.parametrize("step", [3e-6, 1e-4, 1e-3, 3e-3, 1.0])
def test_a_sample_tells_the_entropy_and_the_error_of_its_rounded_numbers(step):
    numbers = 1e-3 * torch.randn(100, 70, generator=torch.Generator().manual_seed(0)) + 1e-4
    codes = quantise_steps(numbers, step)
    p = np.unique(codes.numpy(), return_counts=True)[1] / numbers.numel()
    entropy, error = Sample(numbers).rounded(step)
    assert entropy == pytest.approx(-(p * np.log2(p)).sum(), abs=1e-3)
    left = (numbers.double() - codes.double() * step).square().mean()
    assert error == pytest.approx(float(left), rel=1e-3)


def test_a_sample_of_zeros_has_no_entropy_and_no_error():
    assert Sample(torch.zeros(10)).rounded(1.0) == (0.0, 0.0)
