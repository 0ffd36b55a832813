"""The part of its gain that a stored expert keeps, predicted from its squared error over its squared change.

Broad and heavy fine-tunes lose more than narrow ones. Nothing in the weights tells broad from narrow.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Of the squared change the part that is left out, and the part of the gain that is then lost: the most that any of
# four full fine-tunes of SmolLM2-135M lost with 64 prompts each. benchmarks/keep.py tests it on other prompts.
_LEFT = (1.0, 0.61, 0.53, 0.47, 0.41, 0.22, 0.159, 0.107)
_LOST = (1.0, 0.4, 0.14, 0.07, 0.0465, 0.0177, 0.0101, 0.0032)
_POWER = 2.9  # of the left part, below the last point: as between the last two points
_LEAST = 1e-6
# The part of the gain of a broad fine-tune that is lost: so many times the square of the part that is left out, see
# benchmarks/results/broad.json. Of a change that is large beside the base more is lost, and in proportion to what is left
# out where that is little: so many times the squared change over the squared base, see benchmarks/results/heavy.json.
_LOST_OF_SQUARE, _SQUARE_BESIDE_BASE, _LOST_OF_LEFT_BESIDE_BASE = 1.2, 770.0, 270.0
# The part of the gain that is lost to noise as large as the change, and the power of larger noise by which it grows: of
# broad fine-tunes of SmolLM2-135M, between the one that loses most and the others, see benchmarks/results/broad.json.
# Narrow ones lose less, and as much as they where the noise is fifty times the change.
_LOST_TO_NOISE, NOISE_POWER = 0.001, 1.4
# The part that is lost to noise as large as the base, where that is a hundredth: of a fine-tune with too high a learning
# rate, see benchmarks/results/hot.json. It counts for changes of more than some half a percent of the base.
_LOST_BESIDE_BASE = 65.0


def predicted_kept(left: ArrayLike) -> NDArray[np.float64]:
    """Predict the part of its gain over the dense expert that a narrow fine-tune keeps.

    The formula is interpolation between measured points, in logarithms. It is this project's own.

    Args:
        left: the part of the squared change that is left out, in [0, 1], any shape.

    Returns:
        The kept part, in [0, 1], of the same shape.
    """
    lefts = (*_LEFT, _LEAST)
    losts = (*_LOST, _LOST[-1] * (_LEAST / _LEFT[-1]) ** _POWER)
    logs = np.log(np.clip(left, _LEAST, 1.0))
    # np.interp requires ascending places
    lost = np.exp(np.interp(logs, np.log(lefts[::-1]), np.log(losts[::-1])))
    return np.asarray(1 - lost, dtype=np.float64)


def lost_of_left_out(left: ArrayLike, change: ArrayLike) -> NDArray[np.float64]:
    """Predict the part of its gain that an expert loses of which a part is left out, whatever it was trained on.

    It is the most that any family of fine-tunes lost that was measured: narrow, broad, or of a change as large. The formula
    is this project's own.

    Args:
        left: the part of the squared change that is left out, in [0, 1], any shape.
        change: its squared norm over that of the base, of a shape that is broadcast to that of `left`.

    Returns:
        The lost part, in [0, 1], of the same shape as `left`.
    """
    lefts, changes = (np.asarray(figure, dtype=np.float64) for figure in (left, change))
    square = (_LOST_OF_SQUARE + _SQUARE_BESIDE_BASE * changes) * lefts**2
    broad = square + _LOST_OF_LEFT_BESIDE_BASE * changes * lefts
    return np.clip(np.maximum(broad, 1 - predicted_kept(lefts)), 0, 1)


def lost_to_noise(noise: ArrayLike, change: ArrayLike) -> NDArray[np.float64]:
    """Predict the part of its gain over the dense expert that an expert loses to noise without a direction.

    Of a small change it is a power of the noise, and hardly depends on the size of the change: a fine-tune gains about as
    the square of its change. Of a large one the model itself breaks where the noise is large beside the base. The formula
    is this project's own.

    Args:
        noise: its squared norm over that of the change, any shape.
        change: its squared norm over that of the base, of a shape that is broadcast to that of `noise`.

    Returns:
        The lost part, at least 0, of the same shape as `noise`. More than 1 stands for an expert worse than none.
    """
    noises = np.asarray(noise, dtype=np.float64)
    of_change = _LOST_TO_NOISE * noises**NOISE_POWER
    of_base = _LOST_BESIDE_BASE * noises * np.asarray(change, dtype=np.float64)
    return np.maximum(of_change, of_base)


def kept_in_noise(noise: ArrayLike, change: ArrayLike) -> NDArray[np.float64]:
    """Predict the part of its gain that an expert keeps beside noise, in [0, 1]; see `lost_to_noise`."""
    return np.asarray(1 - np.minimum(lost_to_noise(noise, change), 1), dtype=np.float64)
