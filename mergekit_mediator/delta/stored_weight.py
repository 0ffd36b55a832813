"""The stored form of one weight of an expert.

The general form is a low-rank part plus a sparse part. Exact sparse values are the expert's own weights, so
putting them in place gives the expert's bits back. The other forms hold a difference as codes times a scale.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_mediator.delta.factors import Factors
from mergekit_mediator.delta.value_forms import Form


@dataclass(frozen=True)
class StoredWeight:
    """One stored weight: values at some coordinates, and perhaps factors that change all of them.

    Attributes:
        shape: of the weight, as in the checkpoint.
        dtype: of the weight in the dense expert.
        values: the form of `codes`.
        positions: `[k]`, int32 (int64 for weights of 2^31 coordinates or more), flat and ascending.
        codes: `[k]`; for `exact` the expert's own weights in `dtype`, else int8 multiples of `scale`
            (int16 for `steps` and `random_sign`).
        scale: of the codes; 1 for `exact`.
        shift: for `steps`, the magnitude of a code less that of its value, in steps.
        factors: the low-rank part, of the weight as a matrix `[..., in]`; never with `exact` codes.
        share: of this expert in the dense weight, if the difference is from the base; 0 if it is from the
            dense weight. See `coefficient`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Form
    positions: Tensor
    codes: Tensor
    scale: float = 1.0
    shift: float = 0.0
    factors: Factors | None = None
    share: float = 0.0

    def coefficient(self, p: float, total: float) -> float:
        """Compute the coefficient of Δ in a mixture, which adds coefficient · Δ to the dense weight.

        A mixture is W + Σ_t p_t (θ_t − W). Where experts θ_t = θ0 + τ_t are stored relative to the base θ0,
        the dense weight W is θ0 + Σ_s w_s τ_s with shares w_s, and the mixture is
        W + Σ_s (p_s − w_s Σ_t p_t) τ_s. So every expert with a share is part of every mixture, with p = 0 if
        the mixture does not name it, and an expert with τ_t = 0 counts in the sum.

        Args:
            p: the expert's weight in the mixture.
            total: Σ_t p_t over all experts of the mixture, also those that do not change this weight.
        """
        return p - self.share * total

    def difference(self, dense: Tensor) -> Tensor:
        """Decode the sparse part of Δ, `[k]` float32.

        Args:
            dense: `[k]`, the dense expert's weights at the stored positions; only `exact` values need them.
        """
        codes = self.codes.to(torch.float32)
        if self.values == "exact":
            return codes - dense.to(torch.float32)
        return (codes - self.shift * codes.sign() if self.shift else codes) * self.scale

    def weights(self, dense: Tensor) -> Tensor:
        """Compute the expert's weights `[k]` in the dtype of `dense`, without the low-rank part.

        Args:
            dense: `[k]`, the dense expert's weights at the stored positions.
        """
        if self.values == "exact":
            return self.codes.to(dense.dtype)
        return (dense.to(torch.float32) + self.difference(dense)).to(dense.dtype)

    def change(self, dense: Tensor) -> Tensor:
        """Decode Δ as a whole, float32 in the weight's shape.

        Args:
            dense: the dense expert's weight, of the same shape.
        """
        flat = dense.reshape(-1)
        total = torch.zeros(flat.numel(), device=flat.device)
        if self.positions.numel():
            part = self.difference(flat.index_select(0, self.positions))
            total.index_add_(0, self.positions, part)
        if self.factors:
            total.add_(self.factors.product().reshape(-1))
        return total.view(self.shape)

    @classmethod
    def of_factors(
        cls, shape: tuple[int, ...], dtype: torch.dtype, factors: Factors, share: float = 0.0
    ) -> "StoredWeight":
        """Store a low-rank part alone, such as an adapter; no sparse part is needed.

        Args:
            shape: of the weight.
            dtype: of the weight in the dense expert.
            factors: of the weight as a matrix `[..., in]`.
            share: of the expert in the dense weight.
        """
        empty = torch.empty(0, dtype=torch.int32, device=factors.left.device)
        codes = torch.empty(0, dtype=torch.int16, device=factors.left.device)
        return cls(shape, dtype, "steps", empty, codes, factors=factors, share=share)

    def without_zeros(self) -> "StoredWeight":
        """Leave out the coordinates where random signs store no change, most of them; other forms have none.

        The change stays the same. The positions no longer follow from their number, so that the form cannot be encoded.
        """
        if self.values != "random_sign":
            return self
        kept = self.codes != 0
        return replace(self, positions=self.positions[kept], codes=self.codes[kept])

    def to(self, device: torch.device) -> "StoredWeight":
        """Copy the tensors of the stored weight to a device."""
        factors = self.factors.to(device) if self.factors else None
        positions, codes = self.positions.to(device), self.codes.to(device)
        return replace(self, positions=positions, codes=codes, factors=factors)
