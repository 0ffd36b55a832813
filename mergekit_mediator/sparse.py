"""What a sparse expert keeps of one weight: coordinates, and their values relative to the dense expert.

Exact values are the expert's own weights, so that putting them in place gives its bits back. The
quantised forms hold the difference Δ from the dense expert as a code times one scale per tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mergekit_mediator.bits import bit_patterns
from mergekit_mediator.errors import InputError
from mergekit_mediator.threshold import chunks, count_kept, kth_largest, nonzero

Values = Literal["exact", "int8", "int4", "sign"]
VALUES: tuple[Values, ...] = get_args(Values)
_LARGEST_CODE = {"int8": 127, "int4": 7, "sign": 1}


@dataclass(frozen=True)
class SparseTensor:
    """The kept coordinates of one weight.

    Attributes:
        shape: of the weight, as in the checkpoint.
        dtype: of the weight in the dense expert.
        values: how `codes` are to be read.
        positions: `[k]`, int32 (int64 for weights of 2^31 coordinates or more), flat and ascending.
        codes: `[k]`; for `exact` the expert's own weights in `dtype`, else int8 multiples of `scale`.
        scale: of the codes; 1 for `exact`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Values
    positions: Tensor
    codes: Tensor
    scale: float = 1.0

    def difference(self, dense: Tensor) -> Tensor:
        """Δ `[k]` in float32, given the dense expert's weights `[k]` at the kept positions."""
        if self.values == "exact":
            return self.codes.to(torch.float32) - dense.to(torch.float32)
        return self.codes.to(torch.float32) * self.scale

    def weights(self, dense: Tensor) -> Tensor:
        """The expert's weights `[k]` in the dtype of `dense`, the dense expert's at the same positions."""
        if self.values == "exact":
            return self.codes.to(dense.dtype)
        return (dense.to(torch.float32) + self.difference(dense)).to(dense.dtype)

    def to(self, device: torch.device) -> "SparseTensor":
        """The same tensor with its positions and codes on a device."""
        positions, codes = self.positions.to(device), self.codes.to(device)
        return SparseTensor(self.shape, self.dtype, self.values, positions, codes, self.scale)


@dataclass(frozen=True)
class Displaced:
    """The dense weights that a mixture has overwritten: positions `[k]` and stored values `[k]`."""

    positions: Tensor
    weights: Tensor


def encode(
    expert: Tensor, dense: Tensor, density: float, values: Values = "exact", device: str = "cpu"
) -> SparseTensor:
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
    if values == "exact":
        codes, scale = flat_expert[kept], 1.0
    else:
        delta = flat_expert[kept].to(torch.float32) - flat_dense[kept].to(torch.float32)
        if not bool(delta.isfinite().all()):
            raise InputError(
                f"{values} values need finite weights; `values: exact` keeps others too"
            )
        codes, scale = _quantise(delta, values)
        positions, codes = positions[codes != 0], codes[codes != 0]
    index_dtype = torch.int32 if flat_expert.numel() < 2**31 else torch.int64
    stored = positions.to("cpu", index_dtype)
    return SparseTensor(tuple(expert.shape), dense.dtype, values, stored, codes.cpu(), scale)


def mix_(weight: Tensor, parts: Sequence[tuple[float, SparseTensor]]) -> list[Displaced]:
    """W ← W + Σ_t p_t Δ_t in place, summed in float32 and rounded once; gives what `restore_` needs.

    A single expert with weight 1 is put in place as stored, without arithmetic.

    Args:
        weight: contiguous, holding the dense expert's weight.
        parts: the weight p_t and the stored tensor of each expert, on the device of `weight`.
    """
    flat = weight.view(-1)
    displaced = [Displaced(s.positions, flat[s.positions]) for _, s in parts]
    if len(parts) == 1 and parts[0][0] == 1.0:
        flat[parts[0][1].positions] = parts[0][1].weights(displaced[0].weights)
        return displaced
    mixed = flat.to(torch.float32, copy=True)
    for (p, sparse), saved in zip(parts, displaced, strict=True):
        mixed[sparse.positions] += p * sparse.difference(saved.weights)
    flat.copy_(mixed)
    return displaced


def restore_(weight: Tensor, displaced: Sequence[Displaced]) -> None:
    """Put the stored dense weights back, bit for bit."""
    flat = weight.view(-1)
    for saved in displaced:
        flat[saved.positions] = saved.weights


def _select(expert: Tensor, dense: Tensor, density: float, bitwise: bool, device: str) -> Tensor:
    """Ascending positions `[k]` int64 of the coordinates to keep."""
    numel = expert.numel()

    def magnitudes(part: slice) -> Tensor:
        delta = expert[part].to(device, torch.float32) - dense[part].to(device, torch.float32)
        return delta.abs_().nan_to_num_(torch.inf, torch.inf)

    def differs(part: slice) -> Tensor:
        if bitwise:  # 0 and -0 are equal and yet not the same weight
            return bit_patterns(expert[part].to(device)) != bit_patterns(dense[part].to(device))
        return magnitudes(part) > 0

    changed = [nonzero(differs(part)) + part.start for part in chunks(numel)]
    kept = count_kept(numel, density)
    if sum(p.numel() for p in changed) <= kept:
        return torch.cat(changed) if changed else torch.empty(0, dtype=torch.int64)
    threshold, larger = kth_largest(magnitudes, numel, kept)
    ties = kept - larger if threshold > 0 else 0
    positions = []
    for part in chunks(numel):
        values = magnitudes(part)
        keep = values > threshold
        if ties:
            tied = nonzero(values == threshold)[:ties]
            keep[tied] = True
            ties -= tied.numel()
        positions.append(nonzero(keep) + part.start)
    return torch.cat(positions)


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
