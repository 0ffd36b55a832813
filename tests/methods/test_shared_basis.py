"""One basis for all experts, and coefficients for each."""

import pytest
import torch

from mergekit_mediator.methods.shared_basis import shared_basis


def low_rank(experts, rank, shape=(12, 7), seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    left = torch.randn(experts, rows, rank, generator=generator)
    return left @ torch.randn(experts, rank, columns, generator=generator)


def recovered(basis):
    return torch.einsum("mk,tk,nk->tmn", basis.left, basis.coefficients, basis.right)


def error(changes, rank):
    basis = shared_basis(changes.__getitem__, len(changes), rank)
    return float((recovered(basis) - changes).square().sum())


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_every_expert_is_recovered_where_the_rank_holds_them_all(shape):
    changes = low_rank(experts=1, rank=6, shape=shape) * torch.tensor([1.0, -0.5, 0.0]).view(
        3, 1, 1
    )
    basis = shared_basis(changes.__getitem__, 3, 6)
    assert basis.left.shape == (shape[0], 6)
    assert basis.right.shape == (shape[1], 6)
    torch.testing.assert_close(recovered(basis), changes, atol=1e-5, rtol=0)


def test_two_opposite_full_rank_changes_need_one_matrix():
    changes = low_rank(experts=1, rank=7)
    changes = torch.cat([changes, -changes])
    assert error(changes, 7) < 1e-8 * float(changes.square().sum())


def test_a_basis_of_a_lower_rank_has_the_least_error_of_all_that_the_combinations_allow():
    # an oracle: the singular values of the combinations, from the stacked changes
    changes = low_rank(experts=3, rank=2)
    _, _, combined = torch.linalg.svd(changes.flatten(1), full_matrices=False)
    weights = changes.flatten(1) @ combined.T
    matrices = (weights.norm(dim=0)[:, None] * combined).view_as(changes)
    squares = torch.linalg.svdvals(matrices).square().flatten().sort().values
    for rank in (1, 4, 6):
        expected = float(squares[: len(squares) - rank].sum())
        assert error(changes, rank) == pytest.approx(expected, rel=1e-4)


def test_the_order_of_the_experts_does_not_matter():
    changes = low_rank(experts=3, rank=4)
    one = shared_basis(changes.__getitem__, 3, 5)
    other = shared_basis(changes.flip(0).__getitem__, 3, 5)
    torch.testing.assert_close(recovered(one), recovered(other).flip(0), atol=1e-4, rtol=0)


def test_changes_of_nothing_have_no_basis():
    assert shared_basis(torch.zeros(2, 5, 4).__getitem__, 2, 3) is None
