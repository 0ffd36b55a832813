"""Put a mixture in place that was in place before: what depends on the experts alone was computed then."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_mediator.delta.mixing import Displaced, factor_products, put_, restore_
from mergekit_mediator.delta.stored_weight import StoredWeight

Terms = Sequence[tuple[float, StoredWeight]]


@dataclass(frozen=True)
class Overwriting:
    """The step that overwrites weights with a single expert's own, as `mix_` does.

    Attributes:
        positions: `[k]`, flat.
        values: `[k]`, the expert's weights.
    """

    positions: Tensor
    values: Tensor

    @classmethod
    def of(cls, weight: Tensor, terms: Terms) -> "Overwriting | None":
        """Prepare the step; return None if it takes arithmetic. It holds no tensor that the expert does not hold."""
        (coefficient, stored), *others = terms
        exact = stored.values == "exact" and not stored.share and coefficient == 1.0
        if others or not exact or stored.codes.dtype != weight.dtype:
            return None
        return cls(stored.positions, stored.codes)

    def __call__(self, weight: Tensor) -> None:
        """Put the expert in place, into a weight that holds the dense expert's."""
        put_(weight.view(-1), self.positions, self.values)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that only this step holds."""
        return ()


@dataclass(frozen=True)
class Adding:
    """The step that adds low-rank parts in one product, and overwrites the coordinates of sparse parts.

    The product of matrices of 16 bits is summed in float32 and rounded once, as fast as memory allows on a GPU. Left
    factors are split into two numbers of 16 bits each, so that the sum is that of `mix_` but for the order of its
    terms. At the coordinates of sparse parts the weights are those that `mix_` has computed.

    Attributes:
        left: `[out, r]` in the weight's dtype.
        right: `[in, r]` in the weight's dtype.
        positions: `[k]`, flat; the coordinates of all sparse parts.
        values: `[k]`, the weights of the mixture there.
    """

    left: Tensor
    right: Tensor
    positions: Tensor
    values: Tensor

    @classmethod
    def of(cls, weight: Tensor, terms: Terms, displaced: Sequence[Displaced]) -> "Adding | None":
        """Prepare the step from a weight in which `mix_` has put the mixture in place.

        Args:
            weight: contiguous, holding the mixture.
            terms: the coefficient and the stored weight of each expert.
            displaced: the dense expert's weights.

        Returns:
            The step, in place already; None if there is no low-rank part, or if it has no exact form of 16 bits.
        """
        factored = [(c, stored.factors) for c, stored in terms if stored.factors]
        if not factored or weight.dtype != torch.bfloat16:
            return None
        left, right = factor_products(factored)
        high = left.to(weight.dtype)
        sparse = [stored.positions for _, stored in terms if stored.positions.numel()]
        if sparse:
            if any(f.right.dtype not in (torch.int8, weight.dtype) for _, f in factored):
                return None
            low = (left - high.to(torch.float32)).to(weight.dtype)
            high, right = torch.cat([high, low], dim=1), torch.cat([right, right], dim=1)
        positions = torch.cat(sparse) if sparse else left.new_empty(0, dtype=torch.int32)
        if len(sparse) > 1:
            positions = torch.unique(positions)
        values = weight.view(-1).index_select(0, positions)
        step = cls(high, right.to(weight.dtype), positions, values)
        restore_(weight, displaced)
        step(weight)
        return step

    def __call__(self, weight: Tensor) -> None:
        """Put the mixture in place, into a weight that holds the dense expert's."""
        weight.view(-1, weight.shape[-1]).addmm_(self.left, self.right.T)
        if self.positions.numel():
            put_(weight.view(-1), self.positions, self.values)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that only this step holds."""
        return self.left, self.right, self.positions, self.values


Step = Overwriting | Adding
