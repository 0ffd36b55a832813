"""The sparse form of an expert's weight: the coordinates that differ most, exact or quantised."""

import numpy as np
import torch
from torch import Tensor

from mergekit_mediator.delta.chunks import chunks
from mergekit_mediator.delta.float_bits import bit_patterns
from mergekit_mediator.delta.kth_largest import (
    compare,
    count_kept,
    kth_largest,
    lower_bound,
    nonzero,
)
from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.delta.value_forms import Values
from mergekit_mediator.errors import InputError

_LARGEST_CODE = {"int8": 127, "int4": 7, "sign": 1}


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
        device: the device that computes, chunk by chunk; both weights are copied to it.

    Raises:
        InputError: a quantised form is asked for, and a weight is not finite.
    """
    flat_expert, flat_dense = expert.reshape(-1).to(device), dense.reshape(-1).to(device)
    positions = _select(flat_expert, flat_dense, density, values == "exact", device)
    codes, scale = flat_expert.index_select(0, positions), 1.0
    if values != "exact":
        reference = flat_dense.index_select(0, positions).to(torch.float32)
        delta = codes.to(torch.float32) - reference
        if not bool(delta.isfinite().all()):
            raise InputError(
                f"{values} values require finite weights: set `values: exact`, which stores all weights"
            )
        codes, scale = _quantise(delta, values)
        positions, codes = positions[codes != 0], codes[codes != 0]
    shape = tuple(expert.shape)
    return StoredWeight(shape, dense.dtype, values, positions.cpu(), codes.cpu(), scale)


def _select(expert: Tensor, dense: Tensor, density: float, bitwise: bool, device: str) -> Tensor:
    """Ascending positions `[k]`, int32 if they fit, of the coordinates to store; all tensors are on the device."""
    numel = expert.numel()
    dtype = torch.int32 if numel < 2**31 else torch.int64
    count = count_kept(numel, density)

    def magnitudes(part: slice) -> Tensor:
        return (expert[part].to(torch.float32) - dense[part].to(torch.float32)).abs_()

    def candidates(bound: float) -> tuple[Tensor, Tensor]:
        """Positions and |Δ| of coordinates that are not below a bound; with bound 0, of those that differ."""
        positions, magnitude = [], []
        for part in chunks(numel, device):
            delta = magnitudes(part)
            if bound or not bitwise:  # NaN is below no bound
                below = compare(delta, bound, np.less if bound else np.less_equal)
            else:  # 0 and -0 are equal, and yet different weights
                below = bit_patterns(expert[part]) == bit_patterns(dense[part])
            places = nonzero(below.logical_not_())
            magnitude.append(delta.index_select(0, places))
            positions.append(places.to(dtype).add_(part.start))
        return torch.cat(positions), torch.cat(magnitude).nan_to_num_(torch.inf, torch.inf)

    if not numel:
        return torch.empty(0, dtype=dtype, device=expert.device)
    # A bound from a sample leaves few candidates that are not stored.
    bound = 0.0
    if count < numel:
        bound = lower_bound(lambda part: magnitudes(part).nan_to_num_(torch.inf), numel, count)
    positions, values = candidates(bound)
    if bound and len(positions) < count:
        positions, values = candidates(0.0)
    if len(positions) <= count:
        return positions
    threshold, larger = kth_largest(values.__getitem__, len(values), count, device)
    mask = compare(values, threshold, np.greater)
    if threshold > 0:
        ties = nonzero(compare(values, threshold, np.equal))
        end = int(ties[count - larger - 1]) + 1  # of the ties that are stored
        mask[:end] = compare(values[:end], threshold, np.greater_equal)
    return positions.index_select(0, nonzero(mask))


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
