"""A weight's difference as low rank plus sparse, at one exchange rate between squared error and bytes.

The rate is the slope: the squared error that a stored number must save to be worth storing. With the
same slope for all weights of an expert, no byte would save more elsewhere (Shoham and Gersho, 1988).
"""

import math

import torch
from torch import Tensor

from mergekit_mediator.delta.factors import Components, Factors, decompose, squared_norm
from mergekit_mediator.delta.kth_largest import chunks, nonzero
from mergekit_mediator.delta.stored_weight import StoredWeight

# The remainder's step is this times √slope; below 0.65 steps it is dropped. Found on full fine-tunes.
_REMAINDER_STEP = 2.0
_DEAD_ZONE = 0.65
_LARGEST_CODE = 32767
# What is left out makes a change smaller than it was, and its expert less sure than it was. What is kept is
# multiplied by this power of the ratio of their norms. Found on prompts that are not reported.
_NORM_POWER = 0.375
# Vectors are few and matter much: a sixteenth of their root mean square as the step, about 6 bits each.
_VECTOR_STEP = 1 / 16


def approximate(
    difference: Tensor,
    slope: float,
    dtype: torch.dtype,
    share: float = 0.0,
    components: Components | None = None,
) -> StoredWeight:
    """The difference of an expert from its reference, as low rank plus sparse.

    Args:
        difference: float32, any shape, finite. Two and more dimensions are a matrix `[..., in]`.
        slope: squared error per stored number, > 0.
        dtype: of the weight that it is the difference of.
        share: of the expert in the dense weight, if the difference is from the base; see `StoredWeight`.
        components: of the difference as a matrix, where they are known.
    """
    if is_vector(difference):
        rms = float(difference.square().mean().sqrt()) if difference.numel() else 0.0
        return _steps(difference, None, rms * _VECTOR_STEP, dtype, share)
    matrix = as_matrix(difference)
    components = components or decompose(matrix)
    factors = components.quantise(slope, matrix)
    return _steps(difference, factors, remainder_step(slope), dtype, share)


def is_vector(weight: Tensor) -> bool:
    """Whether a weight is too thin for factors."""
    return weight.dim() < 2 or weight.numel() == 0 or min(as_matrix(weight).shape) < 2


def remainder_step(slope: float) -> float:
    """The step of the remainder at a slope."""
    return _REMAINDER_STEP * math.sqrt(slope)


def as_matrix(weight: Tensor) -> Tensor:
    """A weight as `[out, in]`."""
    return weight.reshape(-1, weight.shape[-1])


def is_dropped(largest: float, step: float) -> bool:
    """Whether nothing is kept of a remainder in which no number is larger than this."""
    return largest < _DEAD_ZONE * step


def quantise_steps(remainder: Tensor, step: float) -> Tensor:
    """int16 integers of the same shape: multiples of the step, with a dead zone around 0."""
    flat = remainder.reshape(-1)
    codes = torch.empty(flat.shape, dtype=torch.int16, device=flat.device)
    for part in chunks(flat.numel()):
        scaled = flat[part] / step
        whole = (scaled.abs() + (1 - _DEAD_ZONE)).floor_().clamp_(max=_LARGEST_CODE)
        codes[part] = whole.mul_(scaled.sign_())
    return codes.view(remainder.shape)


def _steps(
    difference: Tensor, factors: Factors | None, step: float, dtype: torch.dtype, share: float
) -> StoredWeight:
    """What factors leave of a difference, in steps."""
    if factors is None:
        flat = difference.reshape(-1).clone()
    else:
        flat = factors.product().neg_().view_as(difference).add_(difference).reshape(-1)
    if flat.numel():
        step = max(step, float(flat.abs().max()) / _LARGEST_CODE)
    codes = quantise_steps(flat, step) if step else torch.zeros(flat.shape, dtype=torch.int16)
    index_dtype = torch.int32 if flat.numel() < 2**31 else torch.int64
    positions = nonzero(codes != 0).to(index_dtype)
    kept = codes[positions]
    # within a step most weights lie nearer to zero than its middle: their mean is the better value
    magnitude = (flat[positions] / step).abs_() if step else flat[positions]
    shift = float((kept.abs() - magnitude).mean()) if kept.numel() else 0.0
    lost = flat.index_add_(0, positions, (shift * kept.sign() - kept) * step)
    strength = _strength(difference.reshape(-1), lost)
    return StoredWeight(
        shape=tuple(difference.shape),
        dtype=dtype,
        values="steps",
        positions=positions,
        codes=kept,
        scale=step * strength,
        shift=shift,
        factors=factors and factors.scaled(strength),
        share=share,
    )


def _strength(difference: Tensor, lost: Tensor) -> float:
    """What a part of a difference is multiplied by, given what it lacks."""
    whole, kept = 0.0, 0.0
    for part in chunks(difference.numel()):
        of_part = difference[part]
        whole += squared_norm(of_part)
        kept += squared_norm(of_part - lost[part])
    return max(1.0, math.sqrt(whole / kept)) ** _NORM_POWER if kept else 1.0
