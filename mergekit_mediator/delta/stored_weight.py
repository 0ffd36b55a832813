"""What an expert keeps of one weight, and the one way to put it there and take it away.

In general a low-rank part plus a sparse part. Exact sparse values are the expert's own weights, so that
putting them in place gives its bits back; the other forms hold a difference as codes times a scale.
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
from mergekit_mediator.delta.kth_largest import bracket_of, chunks, compare, count_kept, kth_largest
from mergekit_mediator.delta.value_forms import Form, Values
from mergekit_mediator.errors import InputError

_LARGEST_CODE = {"int8": 127, "int4": 7, "sign": 1}


@dataclass(frozen=True)
class StoredWeight:
    """What is kept of one weight: some coordinates, and perhaps factors that change all of them.

    Attributes:
        shape: of the weight, as in the checkpoint.
        dtype: of the weight in the dense expert.
        values: how `codes` are to be read.
        positions: `[k]`, int32 (int64 for weights of 2^31 coordinates or more), flat and ascending.
        codes: `[k]`; for `exact` the expert's own weights in `dtype`, else int8 multiples of `scale`
            (int16 for `steps`).
        scale: of the codes; 1 for `exact`.
        shift: for `steps`, what a code's magnitude exceeds its value by, in steps.
        factors: the low-rank part, of the weight as a matrix `[..., in]`; never with `exact` codes.
        share: of this expert in the dense weight, if the difference is from the base instead of from
            the dense weight. See `coefficient`.
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
        """The factor of Δ in a mixture, which adds coefficient · Δ to the dense weight.

        A mixture is W + Σ_t p_t (θ_t − W). Where experts θ_t = θ0 + τ_t are stored relative to the base θ0,
        the dense weight W is θ0 + Σ_s w_s τ_s with shares w_s, and the mixture is
        W + Σ_s (p_s − w_s Σ_t p_t) τ_s. So every expert with a share takes part in every mixture, with
        p = 0 if it is not chosen, and an expert with τ_t = 0 counts in the sum.

        Args:
            p: the expert's weight in the mixture.
            total: Σ_t p_t over all experts of the mixture, also those that change nothing here.
        """
        return p - self.share * total

    def difference(self, dense: Tensor) -> Tensor:
        """The sparse part of Δ `[k]` in float32, given the dense expert's weights `[k]` at the kept positions."""
        codes = self.codes.to(torch.float32)
        if self.values == "exact":
            return codes - dense.to(torch.float32)
        return (codes - self.shift * codes.sign() if self.shift else codes) * self.scale

    def weights(self, dense: Tensor) -> Tensor:
        """The expert's weights `[k]` in the dtype of `dense`, the dense expert's at the same positions."""
        if self.values == "exact":
            return self.codes.to(dense.dtype)
        return (dense.to(torch.float32) + self.difference(dense)).to(dense.dtype)

    @classmethod
    def of_factors(
        cls, shape: tuple[int, ...], dtype: torch.dtype, factors: Factors, share: float = 0.0
    ) -> "StoredWeight":
        """A low-rank part alone, as of an adapter: nothing is lost."""
        empty = torch.empty(0, dtype=torch.int32)
        codes = torch.empty(0, dtype=torch.int16)
        return cls(shape, dtype, "steps", empty, codes, factors=factors, share=share)

    def to(self, device: torch.device) -> "StoredWeight":
        """The same tensor with everything on a device."""
        factors = self.factors.to(device) if self.factors else None
        positions, codes = self.positions.to(device), self.codes.to(device)
        return replace(self, positions=positions, codes=codes, factors=factors)


@dataclass(frozen=True)
class Displaced:
    """The dense weights that a mixture has overwritten: stored values `[k]` at positions `[k]`, or all."""

    positions: Tensor | None
    weights: Tensor


def encode(
    expert: Tensor, dense: Tensor, density: float, values: Values = "exact", device: str = "cpu"
) -> StoredWeight:
    """Keep the coordinates of an expert that differ most from the dense expert.

    Args:
        expert: any shape, in the dtype of the dense expert.
        dense: the dense expert's weight, as it will be written.
        density: fraction in (0, 1] of the coordinates to keep; equal magnitudes are kept in order
            of position. Coordinates that do not differ are never kept.
        values: `exact` or one of the quantised forms.
        device: where the arithmetic is done, chunk by chunk.

    Raises:
        InputError: the values are to be quantised and not all of them are finite.
    """
    flat_expert, flat_dense = expert.reshape(-1), dense.reshape(-1)
    positions = _select(flat_expert, flat_dense, density, values == "exact", device)
    kept = positions.to(flat_expert.device)
    codes, scale = flat_expert.index_select(0, kept), 1.0
    if values != "exact":
        reference = flat_dense.index_select(0, kept).to(torch.float32)
        delta = codes.to(torch.float32) - reference
        if not bool(delta.isfinite().all()):
            raise InputError(
                f"{values} values need finite weights; `values: exact` keeps others too"
            )
        codes, scale = _quantise(delta, values)
        positions, codes = positions[codes.cpu() != 0], codes[codes != 0]
    return StoredWeight(tuple(expert.shape), dense.dtype, values, positions, codes.cpu(), scale)


def displace(weight: Tensor, parts: Sequence[tuple[float, StoredWeight]]) -> list[Displaced]:
    """The dense weights that `mix_` will overwrite, for `restore_`; nothing is written."""
    flat = weight.view(-1)
    if any(s.factors for _, s in parts):
        return [Displaced(None, flat.clone())]
    return [Displaced(s.positions, flat.index_select(0, s.positions)) for _, s in parts]


def mix_(
    weight: Tensor,
    parts: Sequence[tuple[float, StoredWeight]],
    displaced: Sequence[Displaced] | None = None,
) -> Sequence[Displaced]:
    """W ← W + Σ_t c_t Δ_t in place, summed in float32 and rounded once; gives what `restore_` needs.

    A single expert with coefficient 1 and no factors is put in place as stored, without arithmetic.

    Args:
        weight: contiguous, holding the dense expert's weight.
        parts: the coefficient c_t and the stored tensor of each expert, on the device of `weight`; see
            `StoredWeight.coefficient`.
        displaced: from `displace`, for a caller that must hold it before anything is written.
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
    # the range of float16 is too small for the factors' scales
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
    """Add all experts' low-rank parts to `[out, in]` in one product, whose factors take the dtype of
    the matrix: it sums in float32 and rounds once, and needs no other copy of the matrix."""
    left = torch.cat([f.left.to(torch.float32) * (c * f.scales) for c, f in factored], dim=1)
    right = torch.cat([f.right.to(matrix.dtype) for _, f in factored], dim=1)
    matrix.addmm_(left.to(matrix.dtype), right.T)


def overwriting(weight: Tensor, stored: StoredWeight) -> Callable[[], None] | None:
    """What puts a single expert with weight 1 in place as `mix_` does, with nothing left to prepare; None
    where that takes arithmetic."""
    if stored.values != "exact" or stored.share or stored.codes.dtype != weight.dtype:
        return None
    flat, positions = bit_patterns(weight.view(-1)), stored.positions
    values = bit_patterns(stored.codes)

    def put() -> None:
        flat.scatter_(0, positions.to(torch.int64), values)

    return put


def restore_(weight: Tensor, displaced: Sequence[Displaced]) -> None:
    """Put the stored dense weights back, bit for bit."""
    flat = weight.view(-1)
    for saved in displaced:
        _put_(flat, saved.positions, saved.weights)


def _put_(flat: Tensor, positions: Tensor | None, values: Tensor) -> None:
    """Overwrite weights, as bits: on CPUs, scattering integers takes half as long as bfloat16."""
    if positions is None:
        flat.copy_(values)
    else:
        bit_patterns(flat).scatter_(0, positions.to(torch.int64), bit_patterns(values))


def _select(expert: Tensor, dense: Tensor, density: float, bitwise: bool, device: str) -> Tensor:
    """Ascending positions `[k]` on the CPU, int32 if they fit, of the coordinates to keep."""
    numel = expert.numel()
    kept = count_kept(numel, density)

    def magnitudes(part: slice) -> Tensor:
        delta = expert[part].to(device, torch.float32) - dense[part].to(device, torch.float32)
        return delta.abs_()

    def candidates(bound: float) -> tuple[Tensor, Tensor]:
        """Positions and |Δ| of what is not below a bound; of all that differs if the bound is 0."""
        positions, magnitude = [], []
        for part in chunks(numel):
            delta = magnitudes(part)
            if bound or not bitwise:  # NaN is not below anything
                below = compare(delta, bound, np.less if bound else np.less_equal)
            else:  # 0 and -0 are equal and yet not the same weight
                below = _bits(expert[part]) == _bits(dense[part])
            found = np.logical_not(below, out=below).nonzero()[0]
            magnitude.append(delta.cpu().numpy()[found])
            positions.append((found + part.start).astype(np.int32 if numel < 2**31 else np.int64))
        values = torch.from_numpy(np.concatenate(magnitude))
        return torch.from_numpy(np.concatenate(positions)), values.nan_to_num_(torch.inf, torch.inf)

    if not numel:
        return torch.empty(0, dtype=torch.int32)
    # a bound from a sample first, so that few more than are kept need a second look
    bound = 0.0
    if kept < numel:
        bound, *_ = bracket_of(lambda part: magnitudes(part).nan_to_num_(torch.inf), numel, kept)
    positions, values = candidates(bound)
    if bound and len(positions) < kept:
        positions, values = candidates(0.0)
    if len(positions) <= kept:
        return positions
    threshold, larger = kth_largest(values.__getitem__, len(values), kept)
    keep = compare(values, threshold, np.greater)
    if threshold > 0:
        keep[compare(values, threshold, np.equal).nonzero()[0][: kept - larger]] = True
    return torch.from_numpy(positions.numpy()[keep.nonzero()[0]])


def _bits(weights: Tensor) -> NDArray[np.signedinteger[Any]]:
    patterns: NDArray[np.signedinteger[Any]] = bit_patterns(weights).cpu().numpy()
    return patterns


def _quantise(delta: Tensor, values: Values) -> tuple[Tensor, float]:
    """int8 codes `[k]` and the scale that loses least: the mean for `sign`, else by a short search."""
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
