"""What a configuration may spend on experts, and what a first pass found, -> the slope of each expert."""

from collections.abc import Mapping, Sequence

import torch
from mergekit.common import ModelReference
from torch import Tensor

from mergekit_mediator.delta.allocation import Allocation
from mergekit_mediator.delta.curve import Point, curve
from mergekit_mediator.delta.tradeoff import slope_for
from mergekit_mediator.errors import ConfigError
from mergekit_mediator.merge.config import MediatorConfig
from mergekit_mediator.merge.estimate import Size, dense_sizes
from mergekit_mediator.merge.loaders import OpenInputs
from mergekit_mediator.merge.passes import Measured
from mergekit_mediator.merge.planner import PlannedWeight
from mergekit_mediator.store.expert_file import header_bytes

# The part of what a budget leaves for experts that is kept back for the error of the prediction.
RESERVE = 0.01
# Of manifest and card: what they say of every weight besides its name, and the rest.
_LISTED_BYTES, _CARD_BYTES = 10, 8000


def slopes_for(
    config: MediatorConfig,
    names: Sequence[str],
    measured: Mapping[str, Measured],
    dense: Mapping[str, Size],
    checkpoint_bytes: int,
    other_bytes: int,
    reserve: float = RESERVE,
) -> dict[ModelReference, float]:
    """The slope of each expert: that which takes its `bits`, or its share of a `budget`.

    One slope for all weights of an expert means that no byte would save more squared error elsewhere in
    it; how experts share a budget is `Allocation`'s.

    Args:
        config: of the merge.
        names: of the routed weights.
        measured: by name, with costs.
        dense: the sizes of the dense expert's weights by name.
        checkpoint_bytes: of the dense expert's checkpoint, with tokenizer and configuration: what `1x` is.
        other_bytes: that were written besides it and count too.
        reserve: the part of the rest that is not spent.

    Raises:
        ConfigError: the budget leaves too little, or the bits are fewer than the least possible.
    """
    models = list(config.experts)
    numel = parameters(names, measured, dense)
    if not numel or (config.bits is None and config.budget is None):
        return {}
    found = tradeoffs(names, measured)
    if config.bits is not None:
        return {
            model: slope_for(tradeoff[0], numel, config.bits)
            for model, tradeoff in zip(models, found, strict=True)
        }
    fixed = fixed_bytes(config, list(dense), names, checkpoint_bytes + other_bytes)
    left = config.budget_bytes(checkpoint_bytes) - fixed
    if left <= 0:
        raise ConfigError(
            f"budget: {config.budget} is {config.budget_bytes(checkpoint_bytes):,} bytes, and the dense "
            f"expert, its tokenizer and the headers of {len(models)} experts take {fixed:,} alone"
        )
    slopes = Allocation(found).slopes(8 * left * (1 - reserve))
    return dict(zip(models, slopes, strict=True))


def check_budget(config: MediatorConfig, dense: Mapping[str, Size]) -> None:
    """Refuse before any weight is read a budget that the dense expert's weights alone exceed.

    Args:
        config: of the merge.
        dense: the sizes of the dense expert's weights by name.

    Raises:
        ConfigError: it leaves nothing for experts.
    """
    required = sum(size.bytes for size in dense.values())
    if config.budget is not None and config.budget_bytes(required) <= required:
        raise ConfigError(
            f"budget: {config.budget} is {config.budget_bytes(required):,} bytes, and the dense "
            f"expert takes {required:,} alone: raise it above 1x"
        )


def bytes_over(
    config: MediatorConfig, names: Sequence[str], checkpoint_bytes: int, written: int
) -> int:
    """By how much an artifact will exceed its budget; negative if it stays within, 0 without one.

    Args:
        config: of the merge.
        names: of all weights.
        checkpoint_bytes: as for `slopes_for`.
        written: bytes of everything but manifest and card.
    """
    if config.budget is None:
        return 0
    return written + described_bytes(names) - config.budget_bytes(checkpoint_bytes)


def predict(
    inputs: OpenInputs, weights: Sequence[PlannedWeight], measured: Mapping[str, Measured]
) -> list[Point]:
    """What every budget would keep, if all layers are routed.

    Args:
        inputs: the models.
        weights: all of them.
        measured: by name, with costs.
    """
    dense = dense_sizes(inputs, weights)
    names = list(dense)
    along = [path for path in inputs.base_directory().iterdir() if path.suffix in (".json", ".txt")]
    checkpoint_bytes = sum(size.bytes for size in dense.values())
    checkpoint_bytes += sum(path.stat().st_size for path in along)
    fixed = fixed_bytes(inputs.config, names, names, checkpoint_bytes)
    numel = parameters(names, measured, dense) * len(inputs.experts)
    return curve(Allocation(tradeoffs(names, measured)), numel, checkpoint_bytes, fixed)


def parameters(
    names: Sequence[str], measured: Mapping[str, Measured], dense: Mapping[str, Size]
) -> int:
    """How many of the parameters of these weights can be stored within a budget."""
    return sum(dense[name].numel for name in names if measured[name].costs)


def tradeoffs(names: Sequence[str], measured: Mapping[str, Measured]) -> list[Tensor]:
    """By expert, what storing these weights takes and leaves at each slope; see `tradeoff.tradeoff`."""
    by_weight = [measured[name].costs for name in names if measured[name].costs]
    return [torch.stack(of_expert).sum(dim=0) for of_expert in zip(*by_weight, strict=True)]


def fixed_bytes(
    config: MediatorConfig, names: Sequence[str], routed: Sequence[str], written: int
) -> int:
    """What an artifact takes before anything of an expert is stored.

    Args:
        config: of the merge.
        names: of all weights.
        routed: of those that experts may store.
        written: bytes of the dense expert and all that is written before experts are.
    """
    return written + described_bytes(names) + len(config.experts) * header_bytes(routed)


def described_bytes(names: Sequence[str]) -> int:
    """What manifest and card take at most, with weights of these names."""
    return _CARD_BYTES + sum(len(name) + _LISTED_BYTES for name in names)
