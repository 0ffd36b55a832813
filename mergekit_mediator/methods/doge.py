"""`doge`: task vectors that share one change, which makes them interfere least outside their common directions."""

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from mergekit_mediator.methods.order_statistics import flat_chunks, order_statistics
from mergekit_mediator.methods.singular import leading_triples, row_blocks
from mergekit_mediator.methods.task_vector_method import (
    Fraction,
    ModelWeight,
    mean,
    shared,
    task_vector_spec,
)
from mergekit_mediator.methods.whole_model import FIGURES, ModelWeights, WholeModelMethod

# Of the mean squared norm of the rows: how much ‖δ‖² counts beside the interference. It leaves 1e-4 of what can
# be undone, and keeps rows with hardly any change from asking for a large one.
_RIDGE = 1e-2
# The residual of the equations, and how many steps it may take at most.
_TOLERANCE, _MOST_STEPS = 1e-4, 30


class Doge(WholeModelMethod):
    """DOGE: Wei et al., "Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent" (2025), section 3.

    Every τ_t gets the factor λ_t = `norm` / ‖τ_t‖. A shared change δ minimises the sum over experts and rows of
    (τ_t · (τ_t − Σ_s λ_s (τ_s + δ)))², among those δ that are orthogonal to the common subspace: the leading left
    directions of all experts' leading singular vectors, smaller side / `subspace` of them. Expert t keeps what is
    among the `density` largest magnitudes of all its weights, and the merged task vector is
    Σ_t λ_t m_t (τ_t + δ). The authors take 400 steps of Adam towards δ; here a few preconditioned conjugate
    gradients find the minimum with a little of ‖δ‖² added. Weights that are no matrices get the mean of the task vectors.
    """

    spec = task_vector_spec(
        "doge",
        "DOGE",
        "https://arxiv.org/abs/2501.01230",
        shared("norm", Annotated[float, Field(gt=0, allow_inf_nan=False)], 0.07),
        shared("subspace", Annotated[int, Field(ge=1)], 6),
        shared("density", Fraction, 0.3),
    )
    whole = ("density",)

    def measure(self, weights: ModelWeights, parameters: Mapping[str, Any]) -> Tensor:
        """The smallest magnitude that each expert keeps of its matrices, `[experts, 1]`."""
        density = parameters["density"]

        def magnitudes() -> Iterator[Tensor]:
            for weight, _ in weights:
                if weight.is_matrix:
                    yield from (part.abs() for part in flat_chunks(weight.taus))

        return order_statistics(
            magnitudes, lambda count: [max(0, count - int(count * density) - 1)]
        )

    def combine(self, weight: ModelWeight, parameters: Mapping[str, Any]) -> Tensor:
        """See the class."""
        if not weight.is_matrix:
            return mean(weight)
        taus, limits = weight.taus, parameters[FIGURES].to(weight.taus.device)
        norms = taus.flatten(1).norm(dim=1)
        factors = torch.where(norms > 0, parameters["norm"] / norms, torch.zeros_like(norms))
        change = shared_change(taus, factors, common_subspace(taus, parameters["subspace"]))
        merged = torch.zeros_like(change)
        for tau, factor, limit in zip(taus, factors, limits, strict=True):
            kept = tau.abs().ge_(limit).mul_(factor)
            merged.addcmul_(tau, kept).addcmul_(change, kept)
        return merged


def common_subspace(taus: Tensor, subspace: int) -> Tensor:
    """The leading left directions of all experts' leading singular vectors.

    Args:
        taus: `[experts, m, n]` float32.
        subspace: the smaller side is divided by it.

    Returns:
        `[m, k]` float32 with orthonormal columns; k may be 0.
    """
    side = min(taus.shape[1:])
    leading = [leading_triples(tau, max(1, side // len(taus)))[0] for tau in taus]
    return leading_triples(torch.cat(leading, dim=1), max(1, side // subspace))[0][
        :, : side // subspace
    ]


def shared_change(taus: Tensor, factors: Tensor, subspace: Tensor) -> Tensor:
    """The small change δ outside a subspace that minimises the interference of the experts.

    Row r of expert t asks for Λ τ_tr · δ_r = c_tr, with Λ = Σ_s λ_s and c_tr = τ_tr · (τ_tr − Σ_s λ_s τ_sr). With
    A the left side of all equations and P the projection off the subspace, δ = P Aᵀ y and A P Aᵀ y = c. Rows meet in
    P alone, so that the small systems of each row are a good preconditioner.

    Args:
        taus: `[experts, m, n]` float32.
        factors: λ, `[experts]`.
        subspace: `[m, k]` with orthonormal columns.

    Returns:
        `[m, n]` float32.
    """
    blocks = row_blocks(taus.shape[1])
    scale = float(factors.sum())
    rows, wanted = [], []
    for block in blocks:
        part = taus[:, block].transpose(0, 1)
        inner = part @ part.mT
        rows.append(inner)
        wanted.append(inner.diagonal(dim1=1, dim2=2) - inner @ factors)
    systems = torch.cat(rows).mul_(scale**2)
    ridge = _RIDGE * float(systems.diagonal(dim1=1, dim2=2).mean())
    delta = torch.zeros_like(taus[0])
    if not ridge:
        return delta

    def change(answer: Tensor) -> Tensor:
        for block in blocks:
            delta[block] = torch.einsum("mt,tmn->mn", answer[block] * scale, taus[:, block])
        return delta.sub_(subspace @ (subspace.mT @ delta))

    def apply(answer: Tensor) -> Tensor:
        change(answer)
        sides = [torch.einsum("tmn,mn->mt", taus[:, block], delta[block]) for block in blocks]
        return torch.cat(sides).mul_(scale).add_(answer, alpha=ridge)

    systems.diagonal(dim1=1, dim2=2).add_(ridge)
    return change(_conjugate_gradients(apply, torch.cat(wanted), torch.linalg.inv(systems)))


def _conjugate_gradients(
    apply: Callable[[Tensor], Tensor], wanted: Tensor, inverse: Tensor
) -> Tensor:
    """Solve a positive definite system with small blocks as its preconditioner.

    Args:
        apply: the matrix, times `[m, experts]`.
        wanted: `[m, experts]`.
        inverse: of the blocks, `[m, experts, experts]`.

    Returns:
        `[m, experts]`.
    """

    def precondition(residual: Tensor) -> Tensor:
        return torch.einsum("mts,ms->mt", inverse, residual)

    answer, residual = torch.zeros_like(wanted), wanted.clone()
    step = precondition(residual)
    direction, product = step, float((residual * step).sum())
    goal = _TOLERANCE**2 * product
    for _ in range(_MOST_STEPS):
        if product <= goal:
            break
        image = apply(direction)
        length = product / float((direction * image).sum())
        answer.add_(direction, alpha=length)
        residual.sub_(image, alpha=length)
        step = precondition(residual)
        before, product = product, float((residual * step).sum())
        direction = step + product / before * direction
    return answer
