"""The stored form of one weight of an expert, and how a mixture is put into the weight and taken out again.

The general form is a low-rank part plus a sparse part. Exact sparse values are the expert's own weights, so
putting them in place gives the expert's bits back. The other forms hold a difference as codes times a scale.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergekit_mediator.delta.factors import Factors
from mergekit_mediator.delta.float_bits import bit_patterns
from mergekit_mediator.delta.kth_largest import (
    chunks,
    compare,
    count_kept,
    kth_largest,
    lower_bound,
)
from mergekit_mediator.delta.value_forms import Form, Values
from mergekit_mediator.errors import InputError

_LARGEST_CODE = {"int8": 127, "int4": 7, "sign": 1}


@dataclass(frozen=True)
class StoredWeight:
    """One stored weight: values at some coordinates, and perhaps factors that change all of them.

    Attributes:
        shape: of the weight, as in the checkpoint.
        dtype: of the weight in the dense expert.
        values: the form of `codes`.
        positions: `[k]`, int32 (int64 for weights of 2^31 coordinates or more), flat and ascending.
        codes: `[k]`; for `exact` the expert's own weights in `dtype`, else int8 multiples of `scale`
            (int16 for `steps`).
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
        empty = torch.empty(0, dtype=torch.int32)
        codes = torch.empty(0, dtype=torch.int16)
        return cls(shape, dtype, "steps", empty, codes, factors=factors, share=share)

    def to(self, device: torch.device) -> "StoredWeight":
        """Copy the tensors of the stored weight to a device."""
        factors = self.factors.to(device) if self.factors else None
        positions, codes = self.positions.to(device), self.codes.to(device)
        return replace(self, positions=positions, codes=codes, factors=factors)


@dataclass(frozen=True)
class Displaced:
    """The dense weights that a mixture overwrites.

    Attributes:
        positions: `[k]`, flat; None for all positions.
        weights: `[k]`, the dense expert's weights there.
    """

    positions: Tensor | None
    weights: Tensor


def encode(
    expert: Tensor, dense: Tensor, density: float, values: Values = "exact", device: str = "cpu"
) -> StoredWeight:
    """Store the coordinates at which an expert differs most from the dense expert.

    Args:
        expert: any shape, in the dtype of the dense expert.
        dense: the dense expert's weight, as the checkpoint will hold it.
        density: fraction in (0, 1] of the coordinates to store. Of equal magnitudes the first positions are
            stored. Coordinates that do not differ are never stored.
        values: `exact` or one of the quantised forms.
        device: the device that computes, chunk by chunk.

    Raises:
        InputError: a quantised form is asked for, and a weight is not finite.
    """
    flat_expert, flat_dense = expert.reshape(-1), dense.reshape(-1)
    positions = _select(flat_expert, flat_dense, density, values == "exact", device)
    places = positions.to(flat_expert.device)
    codes, scale = flat_expert.index_select(0, places), 1.0
    if values != "exact":
        reference = flat_dense.index_select(0, places).to(torch.float32)
        delta = codes.to(torch.float32) - reference
        if not bool(delta.isfinite().all()):
            raise InputError(
                f"{values} values require finite weights: set `values: exact`, which stores all weights"
            )
        codes, scale = _quantise(delta, values)
        positions, codes = positions[codes.cpu() != 0], codes[codes != 0]
    return StoredWeight(tuple(expert.shape), dense.dtype, values, positions, codes.cpu(), scale)


def displace(weight: Tensor, parts: Sequence[tuple[float, StoredWeight]]) -> list[Displaced]:
    """Copy the dense weights that `mix_` will overwrite, for `restore_`; the weight stays as it is.

    Args:
        weight: contiguous, holding the dense expert's weight.
        parts: as for `mix_`.
    """
    flat = weight.view(-1)
    if any(s.factors for _, s in parts):
        return [Displaced(None, flat.clone())]
    return [Displaced(s.positions, flat.index_select(0, s.positions)) for _, s in parts]


def mix_(
    weight: Tensor,
    parts: Sequence[tuple[float, StoredWeight]],
    displaced: Sequence[Displaced] | None = None,
) -> Sequence[Displaced]:
    """Put a mixture into a weight: W ← W + Σ_t c_t Δ_t, summed in float32 and rounded once.

    A single expert with coefficient 1 and no factors is put in place as stored, without arithmetic.

    Args:
        weight: contiguous, holding the dense expert's weight.
        parts: the coefficient c_t and the stored weight of each expert, on the device of `weight`; see
            `StoredWeight.coefficient`.
        displaced: from `displace`, for a caller that must hold it before the weight changes.

    Returns:
        The dense weights that the mixture has overwritten, for `restore_`.
    """
    flat = weight.view(-1)
    displaced = displace(weight, parts) if displaced is None else displaced
    if len(parts) == 1:
        (coefficient, stored), (saved,) = parts[0], displaced
        if coefficient == 1.0 and stored.factors is None:
            _put_(flat, saved.positions, stored.weights(saved.weights))
            return displaced
    factored = [(c, stored.factors) for c, stored in parts if stored.factors]
    factors_alone = not any(stored.positions.numel() for _, stored in parts)
    # The range of float16 is too small for the factors' scales.
    if factored and factors_alone and weight.dtype != torch.float16:
        _add_products_(flat.view(-1, weight.shape[-1]), factored)
        return displaced
    mixed = flat.to(torch.float32, copy=True)
    for coefficient, stored in parts:
        if stored.positions.numel():
            difference = stored.difference(flat.index_select(0, stored.positions))
            mixed.index_add_(0, stored.positions, difference, alpha=coefficient)
    if factored:
        _add_products_(mixed.view(-1, weight.shape[-1]), factored)
    flat.copy_(mixed)
    return displaced


def _add_products_(matrix: Tensor, factored: Sequence[tuple[float, Factors]]) -> None:
    """Add the low-rank parts of all experts to a matrix `[out, in]` in one product.

    The factors take the dtype of the matrix. The product sums in float32 and rounds once, and needs no
    other copy of the matrix.
    """
    left = torch.cat([f.left.to(torch.float32) * (c * f.scales) for c, f in factored], dim=1)
    right = torch.cat([f.right.to(matrix.dtype) for _, f in factored], dim=1)
    matrix.addmm_(left.to(matrix.dtype), right.T)


def overwriting(weight: Tensor, stored: StoredWeight) -> Callable[[], None] | None:
    """Prepare the step that puts a single expert with weight 1 in place, as `mix_` does.

    Args:
        weight: contiguous, holding the dense expert's weight.
        stored: of the expert, on the device of `weight`.

    Returns:
        The step, or None if it takes arithmetic.
    """
    if stored.values != "exact" or stored.share or stored.codes.dtype != weight.dtype:
        return None
    flat, positions = bit_patterns(weight.view(-1)), stored.positions
    values = bit_patterns(stored.codes)

    def put() -> None:
        flat.scatter_(0, positions.to(torch.int64), values)

    return put


def restore_(weight: Tensor, displaced: Sequence[Displaced]) -> None:
    """Put the dense weights back into a weight, bit for bit."""
    flat = weight.view(-1)
    for saved in displaced:
        _put_(flat, saved.positions, saved.weights)


def _put_(flat: Tensor, positions: Tensor | None, values: Tensor) -> None:
    """Overwrite weights as bits: on a CPU, scattering integers takes half as long as scattering bfloat16."""
    if positions is None:
        flat.copy_(values)
    else:
        bit_patterns(flat).scatter_(0, positions.to(torch.int64), bit_patterns(values))


def _select(expert: Tensor, dense: Tensor, density: float, bitwise: bool, device: str) -> Tensor:
    """Ascending positions `[k]` on the CPU, int32 if they fit, of the coordinates to store."""
    numel = expert.numel()
    count = count_kept(numel, density)

    def magnitudes(part: slice) -> Tensor:
        delta = expert[part].to(device, torch.float32) - dense[part].to(device, torch.float32)
        return delta.abs_()

    def candidates(bound: float) -> tuple[Tensor, Tensor]:
        """Positions and |Δ| of coordinates that are not below a bound; with bound 0, of those that differ."""
        positions, magnitude = [], []
        for part in chunks(numel):
            delta = magnitudes(part)
            if bound or not bitwise:  # NaN is below no bound
                below = compare(delta, bound, np.less if bound else np.less_equal)
            else:  # 0 and -0 are equal, and yet different weights
                below = _bits(expert[part]) == _bits(dense[part])
            places = np.logical_not(below, out=below).nonzero()[0]
            magnitude.append(delta.cpu().numpy()[places])
            positions.append((places + part.start).astype(np.int32 if numel < 2**31 else np.int64))
        values = torch.from_numpy(np.concatenate(magnitude))
        return torch.from_numpy(np.concatenate(positions)), values.nan_to_num_(torch.inf, torch.inf)

    if not numel:
        return torch.empty(0, dtype=torch.int32)
    # A bound from a sample leaves few candidates that are not stored.
    bound = 0.0
    if count < numel:
        bound = lower_bound(lambda part: magnitudes(part).nan_to_num_(torch.inf), numel, count)
    positions, values = candidates(bound)
    if bound and len(positions) < count:
        positions, values = candidates(0.0)
    if len(positions) <= count:
        return positions
    threshold, larger = kth_largest(values.__getitem__, len(values), count)
    mask = compare(values, threshold, np.greater)
    if threshold > 0:
        mask[compare(values, threshold, np.equal).nonzero()[0][: count - larger]] = True
    return torch.from_numpy(positions.numpy()[mask.nonzero()[0]])


def _bits(weights: Tensor) -> NDArray[np.signedinteger[Any]]:
    patterns: NDArray[np.signedinteger[Any]] = bit_patterns(weights).cpu().numpy()
    return patterns


def _quantise(delta: Tensor, values: Values) -> tuple[Tensor, float]:
    """int8 codes `[k]` and the scale of least squared error: the mean for `sign`, else by a short search."""
    if not delta.numel():
        return delta.to(torch.int8), 1.0
    if values == "sign":
        return delta.sign().to(torch.int8), float(delta.abs().mean())
    largest = _LARGEST_CODE[values]
    top = float(delta.abs().max()) / largest
    best, best_error = top, torch.inf
    for clip in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3) if values == "int4" else (1.0,):
        scale = top * clip
        rounded = (delta / scale).round_().clamp_(-largest, largest).mul_(scale)
        error = float((rounded - delta).square_().sum())
        if error < best_error:
            best, best_error = scale, error
    return (delta / best).round_().clamp_(-largest, largest).to(torch.int8), best
