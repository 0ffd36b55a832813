"""`tsvm`: the leading singular triples of every task vector, made orthogonal to each other."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from mergekit_mediator.errors import ConfigError
from mergekit_mediator.methods.singular import leading_triples, orthonormal
from mergekit_mediator.methods.task_vector_method import (
    ModelWeight,
    TaskVectorMethod,
    UnreadWeight,
    mean,
    shared,
    task_vector_spec,
)

RANK = shared("rank", Annotated[int, Field(ge=1)] | None, None)


class Tsvm(TaskVectorMethod):
    """TSV-Merge: Gargiulo et al., "Task Singular Vectors" (2025), section 3.2.

    Expert t gives its leading k singular triples (U_t, S_t, V_t). With all of them side by side, U = [U_1 .. U_T]
    and V = [V_1 .. V_T], the merged task vector is U⊥ diag(S_1 .. S_T) V⊥ᵀ, where X⊥ is the matrix with
    orthonormal columns nearest to X. k is `rank`, or the smaller side divided by the number of experts.
    Weights that are no matrices get the mean of the task vectors.
    """

    spec = task_vector_spec("tsvm", "TSV-Merge", "https://arxiv.org/abs/2412.00081", RANK)

    def check(self, weights: Sequence[UnreadWeight]) -> None:
        """Refuse a rank above the smaller side of a matrix."""
        for weight in weights:
            check_rank(weight)

    def combine(self, weight: ModelWeight, parameters: Mapping[str, Any]) -> Tensor:
        """See the class."""
        if not weight.is_matrix:
            return mean(weight)
        side, rank = min(weight.base.shape), parameters["rank"]
        count = len(weight.taus)
        # a checkpoint without headers is read unchecked
        rank = min(side, rank or max(1, side // count))
        return orthogonal_sum(weight.taus, [rank] * count, torch.ones(count))


def orthogonal_sum(taus: Tensor, ranks: Sequence[int], factors: Tensor) -> Tensor:
    """U⊥ diag(S) V⊥ᵀ of the leading triples of several matrices.

    Args:
        taus: `[experts, m, n]` float32.
        ranks: how many triples of each, from 1 to the smaller side.
        factors: of the singular values of each, `[experts]`.

    Returns:
        `[m, n]` float32.
    """
    lefts, values, rights = [], [], []
    for tau, rank, factor in zip(taus, ranks, factors.tolist(), strict=True):
        left, of_tau, right = leading_triples(tau, rank)
        lefts.append(left)
        values.append(of_tau * factor)
        rights.append(right)
    outer = orthonormal(torch.cat(lefts, dim=1)).mul_(torch.cat(values))
    return outer @ orthonormal(torch.cat(rights, dim=1)).mT


def check_rank(weight: UnreadWeight) -> None:
    """Refuse a rank that a matrix does not have.

    Raises:
        ConfigError: `rank` is above the smaller side.
    """
    rank, shape = weight.parameters["rank"], weight.shape
    if rank is not None and shape is not None and len(shape) == 2 and rank > min(shape):
        raise ConfigError(
            f"rank: at most {min(shape)} required, the smaller side of {weight.name} {list(shape)}, "
            f"got {rank}: lower it, or give this weight its own with a filter"
        )
