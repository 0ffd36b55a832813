"""The pass that writes the experts' files, tunes experts on prompts, and keeps to a budget."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from mergekit.common import ModelReference

from mergekit_mediator.merge.budget import bytes_over, slopes_for
from mergekit_mediator.merge.dense_pass import DensePass
from mergekit_mediator.merge.encode import Encoder, adapters_for
from mergekit_mediator.merge.estimate import dense_sizes
from mergekit_mediator.merge.passes import Passes
from mergekit_mediator.merge.planner import PlannedWeight
from mergekit_mediator.merge.tuning import Lessons, tune
from mergekit_mediator.merge.workers import Workers
from mergekit_mediator.store.expert_file import ExpertWriter
from mergekit_mediator.store.manifest import EXPERTS, Tuned, files_below


@dataclass(frozen=True)
class ExpertPass:
    """The outcome of the pass.

    Attributes:
        slopes: the slope of each expert within `bits` or a `budget`, see `slopes_for`; empty without them.
        tuned: the figures of each tuned expert by name.
    """

    slopes: Mapping[ModelReference, float]
    tuned: Mapping[str, Tuned]


def write_experts(
    passes: Passes,
    workers: Workers,
    weights: Sequence[PlannedWeight],
    dense: DensePass,
    lessons: Lessons,
    out: Path,
) -> ExpertPass:
    """Write the experts' files. If they exceed the budget, which is rare, write smaller ones instead.

    Args:
        passes: the passes over the models.
        workers: the workers of the passes; they are idle during tuning.
        weights: all weights of the merge.
        dense: the outcome of the pass before.
        lessons: the prompts of each expert that is tuned, see `tuning`.
        out: the directory of the artifact, complete but for experts, card and manifest.

    Raises:
        ConfigError: see `slopes_for`.
        InputError: see `Encoder.encode`.
    """
    inputs = passes.inputs
    config, routed = inputs.config, dense.routed(weights)
    if not config.needs_costs:
        _write(passes, weights, routed, {}, out)
        return ExpertPass({}, {})
    sizes = dense_sizes(inputs, weights)
    names = sorted({weight.info.name for weight in routed})
    checkpoint, others = _written(out)
    spare = 0
    while True:
        slopes = slopes_for(config, names, dense.measured, sizes, checkpoint, others + spare)
        files = _write(passes, weights, routed, slopes, out)
        with workers.idle():
            tuned = tune(inputs, weights, lessons, files, out)
        excess = bytes_over(config, list(sizes), checkpoint, sum(_written(out)))
        if excess <= 0:
            return ExpertPass(slopes, tuned)
        spare += excess
        for path in files.values():
            path.unlink()


def _write(
    passes: Passes,
    weights: Sequence[PlannedWeight],
    routed: Sequence[PlannedWeight],
    slopes: Mapping[ModelReference, float],
    out: Path,
) -> dict[ModelReference, Path]:
    """Write the experts in one pass over the routed weights; return their files."""
    config = passes.inputs.config
    (out / EXPERTS).mkdir(parents=True, exist_ok=True)
    encoder = Encoder(config, passes.device, slopes, adapters_for(passes.inputs, weights))
    with ExitStack() as stack:
        paths, files = {}, {}
        for model, name in config.experts.items():
            paths[model] = out / EXPERTS / f"{name}.safetensors"
            files[model] = ExpertWriter(paths[model], name)
            stack.callback(files[model].abandon)
        for weight, model, encoded in passes.store(routed, out, encoder.encode):
            if encoded is not None:
                files[model].append(weight.info.name, *encoded)
        for file in files.values():
            file.close()
        return paths


def _written(out: Path) -> tuple[int, int]:
    """Count the bytes of the checkpoint, and those of all other files so far."""
    sizes = {name: (out / name).stat().st_size for name in files_below(out)}
    checkpoint = sum(size for name, size in sizes.items() if "/" not in name)
    return checkpoint, sum(sizes.values()) - checkpoint
