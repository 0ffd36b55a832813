"""Weights in a narrower dtype; a finite number that would become infinite is an error."""

import math

import torch
from torch import Tensor

from mergekit_mediator.errors import InputError

# Dtypes that the error text offers for `out_dtype`.
_WIDER = (torch.bfloat16, torch.float32)


def narrowed(weight: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """Convert a weight to another dtype.

    Args:
        weight: any shape, any floating dtype.
        dtype: of the result.
        where: the weight and its model, for the error message.

    Raises:
        InputError: a finite number of the weight is infinite in that dtype.
    """
    check_range(weight, dtype, where)
    return weight.to(dtype)


def check_range(weight: Tensor, dtype: torch.dtype, where: str) -> None:
    """Check that `narrowed` takes a weight; no copy of it is made.

    Raises:
        InputError: a finite number of the weight is infinite in that dtype.
    """
    if torch.finfo(weight.dtype).max > torch.finfo(dtype).max:
        lost = lost_magnitude(weight, dtype)
        if lost:
            raise range_error(where, lost, dtype)


def lost_magnitude(weight: Tensor, dtype: torch.dtype, finite: bool = False) -> float:
    """Find the largest finite magnitude of a weight that is infinite in a dtype.

    Args:
        weight: any shape, any floating dtype.
        dtype: a narrower one, or the same.
        finite: whether the weight was computed from finite numbers. A number that is not finite is then an
            overflow, and counts as infinity.

    Returns:
        The magnitude; 0 if no finite number becomes infinite.
    """
    if not weight.numel():
        return 0.0
    low, high = weight.aminmax()
    if max(-float(low), float(high)) <= torch.finfo(dtype).max and not bool(low.isnan()):
        return 0.0
    if finite and not bool(weight.isfinite().all()):
        return math.inf
    lost = weight[weight.isfinite() & weight.to(dtype).isfinite().logical_not_()]
    return float(lost.abs().max()) if lost.numel() else 0.0


def range_error(where: str, magnitude: float, dtype: torch.dtype) -> InputError:
    """Make the error of `narrowed`.

    Args:
        where: the weight and its model.
        magnitude: from `lost_magnitude`.
        dtype: of the result.
    """
    names = [_name(wider) for wider in _WIDER if magnitude <= torch.finfo(wider).max]
    if not names:
        size = f"magnitude {magnitude:.6g}" if math.isfinite(magnitude) else "its merged value"
        return InputError(
            f"{where}: {size} is beyond float32, in which merges are computed: scale down the weights of "
            "the models"
        )
    return InputError(
        f"{where}: its largest magnitude, {magnitude:.6g}, becomes infinite in {_name(dtype)}, which ends "
        f"at {torch.finfo(dtype).max:.6g}: set out_dtype to {' or '.join(names)} (--allow-nonfinite is for "
        "numbers that are infinite in the inputs)"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
