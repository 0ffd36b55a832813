"""The basis that all experts share in each weight, computed once for all of them."""

from collections.abc import Callable, Sequence
from threading import Lock

import torch
from mergekit.common import ModelReference
from torch import Tensor

from mergekit_mediator.delta.factors import Factors
from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.methods.shared_basis import SharedBasis, shared_basis


class SharedBases:
    """The bases of the weights whose experts are being stored. It is thread-safe.

    A basis stays in memory from the first expert of its weight to the last.
    """

    def __init__(self, experts: Sequence[ModelReference], rank: int, device: str) -> None:
        """Start without a basis.

        Args:
            experts: all experts, each of which asks once for each weight.
            rank: of the bases.
            device: the device that computes, in float32.
        """
        self._experts, self._rank, self._device = tuple(experts), rank, device
        self._lock = Lock()
        self._weights: dict[str, _Weight] = {}

    def store(
        self,
        name: str,
        model: ModelReference,
        dense: Tensor,
        load: Callable[[ModelReference], Tensor],
    ) -> StoredWeight | None:
        """Give the stored form of one expert's weight: the basis, with this expert's coefficients.

        Args:
            name: of the weight.
            model: the expert.
            dense: the dense expert's weight `[out, in]`.
            load: loads the weight of any expert, in the dtype of `dense`.

        Returns:
            The stored form, whose factors have the dtype of `dense`; None if all experts have the dense weight.
        """

        def change(expert: int) -> Tensor:
            weight = load(self._experts[expert]).to(self._device, torch.float32)
            return weight - dense.to(self._device, torch.float32)

        with self._lock:
            entry = self._weights.setdefault(name, _Weight(len(self._experts)))
        with entry.lock:
            if not entry.computed:
                entry.basis = shared_basis(change, len(self._experts), self._rank)
                entry.computed = True
            basis = entry.basis
            entry.left -= 1
        if not entry.left:
            with self._lock:
                del self._weights[name]
        if basis is None:
            return None
        dtype = dense.dtype if dense.dtype != torch.float64 else torch.float32
        left, right = (side.to("cpu", dtype).contiguous() for side in (basis.left, basis.right))
        scales = basis.coefficients[self._experts.index(model)].cpu().contiguous()
        factors = Factors(left, right, scales)
        return StoredWeight.of_factors(tuple(dense.shape), dense.dtype, factors)


class _Weight:
    """One weight: its basis, and the number of experts that have yet to ask for it."""

    def __init__(self, experts: int) -> None:
        self.lock = Lock()
        self.basis: SharedBasis | None = None
        self.computed, self.left = False, experts
