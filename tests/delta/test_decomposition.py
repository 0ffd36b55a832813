from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_mediator.delta.decomposition import decompose


def matrix(out, width, rank=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(out, width, generator=generator)
    left = torch.randn(out, rank, generator=generator)
    return left @ torch.randn(rank, width, generator=generator)


@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 2**31))
def test_components_are_the_singular_value_decomposition(out, width, seed):
    full = matrix(out, width, seed=seed)
    found = decompose(full)
    expected = torch.linalg.svdvals(full.double())
    assert torch.allclose(found.values.double(), expected, rtol=1e-3, atol=1e-3 * expected[0])
    rebuilt = (found.left * found.values) @ found.right.T
    assert torch.allclose(rebuilt, full, atol=1e-3 * float(expected[0]))


def test_components_of_a_matrix_of_low_rank_are_only_as_many():
    found = decompose(matrix(60, 40, rank=3))
    assert found.values.numel() == 3


@pytest.mark.parametrize("shape", [(50, 40), (40, 50), (1, 3)])
@pytest.mark.parametrize("largest_gram", [10, 100])
def test_no_components_are_found_where_nothing_changed(shape, largest_gram):
    found = decompose(torch.zeros(shape), largest_gram)
    assert found.left.shape == (shape[0], 0)
    assert found.right.shape == (shape[1], 0)
    assert found.values.numel() == 0
    assert found.energy == 0


def test_large_matrices_are_decomposed_by_projection_and_repeatably():
    full = matrix(300, 200, rank=5) + 1e-3 * matrix(300, 200)
    expected = decompose(full)
    state = torch.get_rng_state()
    projected, again = (decompose(full, largest_gram=100) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(projected.left, again.left)
    assert not torch.equal(projected.left, expected.left)
    assert torch.allclose(projected.values[:5], expected.values[:5], rtol=1e-3)


def test_matrices_that_are_projected_by_several_threads_have_equal_components():
    full = matrix(300, 200, rank=5) + 1e-3 * matrix(300, 200)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: decompose(full, largest_gram=100), range(8)))
    assert all(torch.equal(found[0].right, other.right) for other in found)


@pytest.mark.parametrize("scale", [1e-22, 1e18])
def test_numbers_whose_squares_float32_does_not_hold_are_decomposed(scale):
    full = matrix(60, 40, rank=3)
    found = decompose(full * scale)
    assert found.values.numel() == 3
    assert torch.allclose(found.values, decompose(full).values * scale)
    assert found.energy == pytest.approx(float(full.square().sum()) * scale**2, rel=1e-5)


def test_small_components_beside_a_large_one_are_found():
    left, right = (torch.linalg.qr(matrix(300, 4, seed=seed)).Q for seed in (1, 2))
    values = torch.tensor([1.0, 1e-2, 3e-3, 1e-3])
    found = decompose((left * values) @ right.T)
    assert torch.allclose(found.values[:4], values, rtol=1e-2)
