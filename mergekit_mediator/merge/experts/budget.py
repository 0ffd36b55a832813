"""The slopes that spend the `bits` or the `budget` of a configuration, or that its `keep` requires.

A first pass measures the costs of each weight; `slopes_for` turns them into one slope for each expert.
"""

from collections.abc import Mapping, Sequence

from mergekit.common import ModelReference

from mergekit_mediator.delta.allocation import Allocation, Divergences
from mergekit_mediator.delta.curve import KeptPoint, Point, curve, kept_curve
from mergekit_mediator.delta.tradeoff import slope_for
from mergekit_mediator.errors import ConfigError
from mergekit_mediator.merge.config import MediatorConfig
from mergekit_mediator.merge.estimate import Size, dense_sizes
from mergekit_mediator.merge.experts.forms import Forms, allocation_of, choose_forms, tradeoffs
from mergekit_mediator.merge.loaders import OpenInputs
from mergekit_mediator.merge.measured import Measured
from mergekit_mediator.merge.planner import PlannedWeight
from mergekit_mediator.store.expert_file import header_bytes

# Manifest and card take so many bytes for each weight besides its name, and so many for everything else.
_LISTED_BYTES, _CARD_BYTES = 10, 9000


def slopes_for(
    config: MediatorConfig,
    forms: Forms,
    names: Sequence[str],
    measured: Mapping[str, Measured],
    dense: Mapping[str, Size],
    checkpoint_bytes: int,
    other_bytes: int,
    targets: Mapping[ModelReference, float],
    divergences: Mapping[ModelReference, Divergences],
    reserve: float = 0.01,
) -> dict[ModelReference, float]:
    """Find for each expert the slope that spends its `bits` or its share of the `budget`, or that `keep` requires.

    All weights of an expert have one slope, so that no byte would save more squared error in another
    weight. `Allocation` divides a budget among the experts.

    Args:
        config: the configuration of the merge.
        forms: the form of each expert.
        names: the names of the routed weights.
        measured: the figures of each weight by name, with costs.
        dense: the sizes of the dense expert's weights by name.
        checkpoint_bytes: the bytes of the dense expert's checkpoint with tokenizer and configuration. They
            are the `1x` of a budget.
        other_bytes: the bytes of other files that count towards the budget.
        targets: the predicted part of its gain that each expert shall keep, if the configuration has `keep`.
        divergences: what was measured of experts that have prompts, by which a budget is divided; may be empty.
        reserve: the fraction of the bytes for experts that stays unspent, because sizes are predictions.

    Returns:
        The slope of each expert, in squared error per stored number; empty if the configuration has none of
        `bits`, `budget` and `keep`, or if experts can store none of the weights.

    Raises:
        ConfigError: the budget leaves too little for experts, or fewer `bits` are asked for than the
            smallest form takes.
    """
    models = list(config.experts)
    numel = parameters(names, measured, dense)
    if not numel or not config.needs_costs:
        return {}
    if config.bits is not None:
        (form,) = config.rate_forms
        return {
            model: slope_for(tradeoff[0], numel, config.bits)
            for model, tradeoff in zip(
                models, tradeoffs(names, measured, [form] * len(models)), strict=True
            )
        }
    diverging = [divergences.get(model, {}) for model in models]
    allocation = allocation_of(forms, names, measured, diverging)
    required = None
    if config.keep is not None:
        required = allocation.slopes_to_keep([targets[model] for model in models])
        if config.budget is None:
            return dict(zip(models, required, strict=True))
    fixed = fixed_bytes(config, list(dense), names, checkpoint_bytes + other_bytes)
    left = config.budget_bytes(checkpoint_bytes) - fixed
    if left <= 0:
        raise ConfigError(
            f"budget: {config.budget} is {config.budget_bytes(checkpoint_bytes):,} bytes, but the dense "
            f"expert, its tokenizer and the headers of {len(models)} experts alone take {fixed:,}: raise it"
        )
    bits = 8 * left * (1 - reserve)
    if required is not None and allocation.spent(required) <= bits:
        return dict(zip(models, required, strict=True))
    return dict(zip(models, allocation.slopes(bits), strict=True))


def predict_kept(
    forms: Forms,
    names: Sequence[str],
    measured: Mapping[str, Measured],
    slopes: Mapping[ModelReference, float],
) -> dict[ModelReference, float]:
    """Predict the part of its gain, in [0, 1], that each expert keeps at its slope.

    Args:
        forms: the form of each expert.
        names: the names of the routed weights.
        measured: the figures of each weight by name, with costs.
        slopes: the slope of each expert, from `slopes_for` within `keep` or a `budget`.
    """
    if not slopes:
        return {}
    allocation = allocation_of(forms, names, measured)
    kept = allocation.kept(list(slopes.values()))
    return dict(zip(slopes, kept, strict=True))


def check_budget(config: MediatorConfig, dense: Mapping[str, Size]) -> None:
    """Refuse a budget that the weights of the dense expert alone use up, before any weight is read.

    Args:
        config: the configuration of the merge.
        dense: the sizes of the dense expert's weights by name.

    Raises:
        ConfigError: the budget leaves nothing for experts.
    """
    required = sum(size.bytes for size in dense.values())
    if config.budget is not None and config.budget_bytes(required) <= required:
        raise ConfigError(
            f"budget: {config.budget} is {config.budget_bytes(required):,} bytes, but the dense "
            f"expert alone takes {required:,}: raise it above 1x"
        )


def bytes_over(
    config: MediatorConfig, names: Sequence[str], checkpoint_bytes: int, written: int
) -> int:
    """Count the bytes by which an artifact will exceed its budget.

    The count is negative if the artifact stays below its budget, and 0 if it has none.

    Args:
        config: the configuration of the merge.
        names: the names of all weights.
        checkpoint_bytes: as for `slopes_for`.
        written: the bytes of all files but manifest and card.
    """
    if config.budget is None:
        return 0
    return written + described_bytes(names) - config.budget_bytes(checkpoint_bytes)


def predict(
    inputs: OpenInputs, weights: Sequence[PlannedWeight], measured: Mapping[str, Measured]
) -> tuple[list[Point], list[KeptPoint]]:
    """Predict what experts keep within each of many budgets, and what it takes to keep parts, with all layers routed.

    Args:
        inputs: the models.
        weights: all weights of the merge.
        measured: the figures of each weight by name, with costs.

    Returns:
        The points of the curve and the bytes of each `keep`, see `delta.curve`.
    """
    dense = dense_sizes(inputs, weights)
    names = list(dense)
    paths = [path for path in inputs.base_directory().iterdir() if path.suffix in (".json", ".txt")]
    checkpoint_bytes = sum(size.bytes for size in dense.values())
    checkpoint_bytes += sum(path.stat().st_size for path in paths)
    fixed = fixed_bytes(inputs.config, names, names, checkpoint_bytes)
    numel = parameters(names, measured, dense) * len(inputs.experts)
    sizes = (numel, checkpoint_bytes, fixed)

    def keeping(keep: float | None) -> Allocation:
        forms = choose_forms(inputs.config, names, measured, dense, keep)
        return allocation_of(forms, names, measured)

    return curve(keeping(None), *sizes), kept_curve(keeping, *sizes)


def parameters(
    names: Sequence[str], measured: Mapping[str, Measured], dense: Mapping[str, Size]
) -> int:
    """Count the parameters of those named weights that `bits`, `budget` or `keep` can store."""
    return sum(dense[name].numel for name in names if measured[name].costs)


def fixed_bytes(
    config: MediatorConfig, names: Sequence[str], routed: Sequence[str], written: int
) -> int:
    """Count the bytes of an artifact whose experts store nothing.

    Args:
        config: the configuration of the merge.
        names: the names of all weights.
        routed: the names of the weights that experts may store.
        written: the bytes of the dense expert and of the other files that the merge writes before experts.
    """
    return written + described_bytes(names) + len(config.experts) * header_bytes(routed)


def described_bytes(names: Sequence[str]) -> int:
    """Give an upper bound in bytes on manifest and card, from the names of all weights."""
    return _CARD_BYTES + sum(len(name) + _LISTED_BYTES for name in names)
