"""Every rival stored form is what its paper's formula says, in as many bits as it counts."""

import math

import peers
import pytest
import torch


@pytest.fixture
def matrix():
    return torch.randn(24, 40, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def parts(matrix):
    return peers.Decomposition.of(matrix)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_a_decomposition_is_that_of_torch(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    parts = peers.Decomposition.of(matrix)
    torch.testing.assert_close(parts.values, torch.linalg.svdvals(matrix), rtol=1e-4, atol=1e-5)
    product = (parts.left * parts.values) @ parts.right.T
    torch.testing.assert_close(product, matrix, rtol=1e-4, atol=1e-5)


def test_a_matrix_of_zeros_is_decomposed_into_nothing():
    assert peers.Decomposition.of(torch.zeros(5, 4)).values.numel() == 0


def test_low_rank_leaves_the_smaller_singular_values(matrix, parts):
    stored = peers.low_rank(parts, 6)
    left = (matrix - stored.approximation).square().sum()
    assert left == pytest.approx(float(torch.linalg.svdvals(matrix)[6:].square().sum()), rel=1e-2)
    assert stored.bits == 16 * 6 * (24 + 40)


def test_one_bit_is_the_sign_times_the_mean_magnitude(matrix):
    stored = peers.one_bit(matrix)
    assert torch.allclose(stored.approximation, matrix.abs().mean() * matrix.sign(), atol=1e-6)
    assert stored.bits == 24 * 40 + 16


def test_a_second_bit_stores_the_signs_of_what_the_first_left(matrix):
    first = peers.one_bit(matrix).approximation
    second = peers.one_bit(matrix - first).approximation
    stored = peers.one_bit(matrix, rounds=2)
    assert torch.allclose(stored.approximation, first + second, atol=1e-6)
    assert stored.bits == 2 * (24 * 40 + 16)


def test_bits_by_singular_value_are_eight_then_three_then_two(matrix, parts):
    numbers = 24 + 40
    price = {bits: bits * numbers + 32 for bits in (8, 3, 2)}
    widths = [8] * 2 + [3] * 5
    expected = torch.zeros(24, 40)
    for i, bits in enumerate(widths):
        left = peers.rounded(parts.left[:, i : i + 1] * parts.values[i], bits)
        expected += left @ peers.rounded(parts.right[:, i : i + 1], bits).T
    stored = peers.by_singular_value(parts, sum(price[bits] for bits in widths))
    assert torch.allclose(stored.approximation, expected, atol=1e-5)
    assert stored.bits == sum(price[bits] for bits in widths)


def test_bits_by_singular_value_take_two_bits_after_thirty_four_triples():
    parts = peers.Decomposition.of(torch.randn(60, 60, generator=torch.Generator().manual_seed(2)))
    stored = peers.by_singular_value(parts, 1e9)
    assert stored.bits == 2 * (8 * 120 + 32) + 32 * (3 * 120 + 32) + 26 * (2 * 120 + 32)


def test_sign_first_decomposes_what_the_signs_leave(matrix):
    coarse = peers.one_bit(matrix)
    remainder = peers.Decomposition.of(matrix - coarse.approximation)
    rest = peers.low_rank(remainder, 3)
    stored = peers.sign_first(matrix, remainder, 3)
    assert torch.equal(stored.approximation, coarse.approximation + rest.approximation)
    assert stored.bits == 24 * 40 + 16 + 16 * 3 * (24 + 40)


def test_ternary_keeps_the_largest_numbers_of_the_whole_expert(matrix):
    weights = {"small": 0.1 * matrix, "large": matrix}
    stored = peers.ternary(weights, 0.25)
    everything = torch.cat([weight.flatten() for weight in weights.values()])
    kept = everything.abs().topk(480).values
    approximation = torch.cat([s.approximation.flatten() for s in stored.values()])
    assert int((approximation != 0).sum()) == 480
    assert torch.allclose(approximation.unique(), kept.mean() * torch.tensor([-1.0, 0, 1]))
    assert (stored["small"].approximation == 0).all()
    bits = 1920 * (0.25 - 0.25 * math.log2(0.25) - 0.75 * math.log2(0.75)) + 16
    assert sum(s.bits for s in stored.values()) == pytest.approx(bits)


def test_ternary_keeps_the_first_of_equal_magnitudes():
    equal = torch.tensor([[2.0, -1.0, 1.0], [-1.0, 1.0, -1.0]])
    (stored,) = peers.ternary({"one": equal}, 0.5).values()
    expected = torch.tensor([[4 / 3, -4 / 3, 4 / 3], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(stored.approximation, expected)


def test_ternary_keeps_nothing_where_nothing_changed(matrix):
    sparse = torch.where(
        torch.rand(24, 40, generator=torch.Generator().manual_seed(4)) < 0.1, matrix, 0
    )
    (stored,) = peers.ternary({"one": sparse}, 0.5).values()
    share = float((sparse != 0).float().mean())
    assert torch.equal(stored.approximation != 0, sparse != 0)
    assert stored.bits == pytest.approx(960 * (share + peers.entropy(share)) + 16, rel=1e-5)


def test_no_scale_of_ternary_is_nearer(matrix):
    (stored,) = peers.ternary({"one": matrix}, 0.3).values()
    error = (matrix - stored.approximation).square().sum()
    for factor in (0.99, 1.01):
        assert (matrix - factor * stored.approximation).square().sum() > error


@pytest.mark.parametrize(("bits", "most"), [(2, 0.15), (3, 0.05), (8, 2e-4)])
def test_rounded_columns_have_so_many_levels(bits, most):
    columns = torch.randn(5000, 3, generator=torch.Generator().manual_seed(3))
    rounded = peers.rounded(columns, bits)
    assert all(len(column.unique()) <= 2**bits for column in rounded.T)
    assert (columns - rounded).square().mean() < most
