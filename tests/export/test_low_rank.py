import pytest
import torch

from mergekit_mediator.export.low_rank import LowRank, side_by_side, squared_norm


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
