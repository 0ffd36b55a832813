"""A weight's difference as low rank plus sparse, at one exchange rate between squared error and bytes.

The rate is the slope: a number is stored if it saves at least that much squared error. With one slope for
all weights of an expert, no byte would save more in another weight (Shoham and Gersho, 1988).
"""

import math

import torch
from torch import Tensor

from mergekit_mediator.delta.chunks import chunks
from mergekit_mediator.delta.decomposition import decompose
from mergekit_mediator.delta.factors import Components, Factors, squared_norm
from mergekit_mediator.delta.kth_largest import nonzero
from mergekit_mediator.delta.stored_weight import StoredWeight

# The step of the remainder is this times √slope. A number below 0.65 steps is dropped. Both were tuned on full
# fine-tunes; no results file holds that search.
_REMAINDER_STEP = 2.0
DEAD_ZONE = 0.65
_LARGEST_CODE = 32767
# An approximation is smaller than the change, which makes its expert less sure. So the approximation is
# multiplied by this power of the ratio of the two norms. The power was tuned on prompts that no table reports;
# benchmarks/results/ablations.json has a merge with power 0, which answers as well.
NORM_POWER = 0.375
# Vectors are few and matter much. The step is a sixteenth of their root mean square: about 6 bits a number.
_VECTOR_STEP = 1 / 16


def approximate(
    difference: Tensor,
    slope: float,
    dtype: torch.dtype,
    share: float = 0.0,
    components: Components | None = None,
    norm_power: float = NORM_POWER,
) -> StoredWeight:
    """Approximate the difference of an expert from its reference by low rank plus sparse.

    Args:
        difference: float32, any shape, finite. Two and more dimensions are a matrix `[..., in]`.
        slope: squared error per stored number, > 0.
        dtype: of the expert's weight in the checkpoint.
        share: of the expert in the dense weight, if the difference is from the base; see `StoredWeight`.
        components: of the difference as a matrix; computed if they are None.
        norm_power: the power of ‖difference‖ / ‖approximation‖ by which the approximation is multiplied.
    """
    if is_vector(difference):
        rms = float(difference.square().mean().sqrt()) if difference.numel() else 0.0
        return _steps(difference, None, rms * _VECTOR_STEP, dtype, share, norm_power)
    matrix = as_matrix(difference)
    components = components or decompose(matrix)
    factors = components.quantise(slope, matrix)
    whole = factors is not None and components.is_whole(factors.rank)
    return _steps(difference, factors, remainder_step(slope), dtype, share, norm_power, whole)


def is_vector(weight: Tensor) -> bool:
    """Whether a weight is too thin for factors."""
    return weight.dim() < 2 or weight.numel() == 0 or min(as_matrix(weight).shape) < 2


def remainder_step(slope: float) -> float:
    """The step of the remainder at a slope, in the unit of the weights."""
    return _REMAINDER_STEP * math.sqrt(slope)


def as_matrix(weight: Tensor) -> Tensor:
    """A weight as a matrix `[out, in]`; all dimensions but the last become one."""
    return weight.reshape(-1, weight.shape[-1])


def is_dropped(largest: float, step: float) -> bool:
    """Whether every number of a remainder is dropped, given the largest magnitude in it."""
    return largest < DEAD_ZONE * step


def quantise_steps(remainder: Tensor, step: float) -> Tensor:
    """Quantise a float32 remainder to int16 multiples of the step, of the same shape, with a dead zone around 0."""
    flat = remainder.reshape(-1)
    codes = torch.empty(flat.shape, dtype=torch.int16, device=flat.device)
    for part in chunks(flat.numel(), flat.device):
        scaled = flat[part] / step
        whole = (scaled.abs() + (1 - DEAD_ZONE)).floor_().clamp_(max=_LARGEST_CODE)
        codes[part] = whole.mul_(scaled.sign_())
    return codes.view(remainder.shape)


def _steps(
    difference: Tensor,
    factors: Factors | None,
    step: float,
    dtype: torch.dtype,
    share: float,
    norm_power: float,
    is_whole: bool = False,
) -> StoredWeight:
    """Factors and the remainder of a difference, which is the difference less their product, in steps.

    If the factors are the whole difference, the remainder is the error of their rounding. It is in every number, and no
    part of it is worth storing.
    """
    if factors is None:
        flat = difference.reshape(-1).clone()
    else:
        flat = factors.product().neg_().view_as(difference).add_(difference).reshape(-1)
    if flat.numel():
        step = max(step, float(flat.abs().max()) / _LARGEST_CODE)
    stored = step and not is_whole
    codes = quantise_steps(flat, step) if stored else torch.zeros_like(flat, dtype=torch.int16)
    index_dtype = torch.int32 if flat.numel() < 2**31 else torch.int64
    positions = nonzero(codes != 0).to(index_dtype)
    codes = codes[positions]
    # Within a step most weights lie nearer to zero than its middle, so their mean is the better value.
    magnitude = (flat[positions] / step).abs_() if step else flat[positions]
    shift = float((codes.abs() - magnitude).mean()) if codes.numel() else 0.0
    lost = flat.index_add_(0, positions, (shift * codes.sign() - codes) * step)
    strength = _strength(difference.reshape(-1), lost, norm_power)
    return StoredWeight(
        shape=tuple(difference.shape),
        dtype=dtype,
        values="steps",
        positions=positions,
        codes=codes,
        scale=step * strength,
        shift=shift,
        factors=factors and factors.scaled(strength),
        share=share,
    )


def _strength(difference: Tensor, lost: Tensor, norm_power: float) -> float:
    """The factor of an approximation, given the part of the difference that it lacks."""
    whole, approximated = 0.0, 0.0
    for part in chunks(difference.numel(), difference.device):
        whole += squared_norm(difference[part])
        approximated += squared_norm(difference[part] - lost[part])
    return max(1.0, math.sqrt(whole / approximated)) ** norm_power if approximated else 1.0
