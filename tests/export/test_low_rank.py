import pytest
import torch

from mergekit_mediator.errors import ExportError
from mergekit_mediator.export.low_rank import LowRank, low_rank, side_by_side, squared_norm


def product(out, width, rank):
    """A sum of two products of a rank, as a blend of two experts makes it."""
    generator = torch.Generator().manual_seed(out + width + rank)
    parts = [
        (
            c,
            torch.randn(out, rank, generator=generator),
            torch.randn(width, rank, generator=generator),
        )
        for c in (0.25, 0.75)
    ]
    left, right = side_by_side(parts)
    return LowRank(left, right, squared_norm(left, right), 0.0)


@pytest.mark.parametrize(
    ("out", "width"), [(40, 30), (6, 30), (40, 6), (6, 6)], ids=lambda size: str(size)
)
@pytest.mark.parametrize("rank", [3, 5, 6, 8])
def test_a_cut_is_the_nearest_product_also_of_matrices_narrower_than_the_factors(out, width, rank):
    whole = product(out, width, 8)
    matrix = (whole.left @ whole.right.T).double()
    cut = whole.cut(rank)
    assert cut.rank == min(rank, out, width)
    rest = float(torch.linalg.svdvals(matrix)[rank:].square().sum())
    norm = float(matrix.square().sum())
    error = float((matrix - cut.left.double() @ cut.right.double().T).square().sum())
    assert error == pytest.approx(rest, abs=1e-6 * norm)
    assert cut.squared_error == pytest.approx(rest, abs=1e-6 * norm)


@pytest.mark.parametrize(("out", "width"), [(40, 30), (6, 30), (6, 6)], ids=lambda size: str(size))
def test_the_errors_of_cuts_are_known_before_they_are_made(out, width):
    whole = product(out, width, 8)
    ranks = (1, 3, 6, 8, 16, 32)
    for rank, error in zip(ranks, whole.squared_errors(ranks), strict=True):
        expected = whole.cut(rank).squared_error
        assert error == pytest.approx(expected, abs=1e-9 * whole.squared_norm)


class Unfactored:
    """A change of a weight of which only the sum is known."""

    is_factored, weight = False, "layers.0.weight"

    def __init__(self, matrix):
        self._matrix = matrix

    def tensor(self, dense):
        return self._matrix


@pytest.mark.parametrize("shape", [(48, 96), (640, 1100), (1100, 640)], ids=str)
@pytest.mark.parametrize("directions", [0, 7, 40])
def test_a_change_of_fewer_directions_than_the_rank_is_exact(shape, directions):
    generator = torch.Generator().manual_seed(0)
    out, width = shape
    left = torch.randn(out, directions, generator=generator)
    matrix = left @ torch.randn(directions, width, generator=generator)
    product = low_rank(Unfactored(matrix), matrix, 256)
    assert product.rank <= min(256, *shape)
    assert product.squared_error <= 1e-6 * product.squared_norm
    torch.testing.assert_close(product.left @ product.right.T, matrix, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(48, 96), (640, 1100), (1100, 640)], ids=str)
def test_the_error_of_a_rank_is_near_that_of_a_full_decomposition(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(matrix.double())
    product = low_rank(Unfactored(matrix), matrix, 32)
    assert product.squared_norm == pytest.approx(float(values.square().sum()))
    assert product.squared_error == pytest.approx(float(values[32:].square().sum()), rel=5e-3)
    error = (product.left @ product.right.T - matrix).double().square().sum()
    assert float(error) == pytest.approx(product.squared_error, rel=1e-4)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(8, 6), (640, 600)], ids=str)
def test_a_change_that_is_not_finite_is_refused(shape, number):
    matrix = torch.zeros(shape)
    matrix[1, 2] = number
    with pytest.raises(ExportError, match=r"layers\.0\.weight: an adapter needs a finite change"):
        low_rank(Unfactored(matrix), matrix, 4)
