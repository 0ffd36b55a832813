"""The pass that writes the experts' files, tunes experts on prompts, and keeps to a budget."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mergekit.common import ModelReference

from mergekit_mediator.delta.allocation import Divergences
from mergekit_mediator.merge.dense_pass import DensePass
from mergekit_mediator.merge.estimate import dense_sizes
from mergekit_mediator.merge.experts.budget import bytes_over, predict_kept, slopes_for
from mergekit_mediator.merge.experts.division import measure_divergences
from mergekit_mediator.merge.experts.encode import Encoder, adapters_for
from mergekit_mediator.merge.experts.forms import Forms, choose_forms, complete
from mergekit_mediator.merge.experts.keep import (
    CORRECTIONS,
    Kept,
    corrected,
    is_capped,
    warn_of_cap,
)
from mergekit_mediator.merge.experts.spectra import SPECTRA, Spectra
from mergekit_mediator.merge.experts.storing import encode_experts
from mergekit_mediator.merge.experts.tuning import Tuning
from mergekit_mediator.merge.lessons import Lessons
from mergekit_mediator.merge.merged_reference import REFERENCE
from mergekit_mediator.merge.passes import Passes
from mergekit_mediator.merge.planner import PlannedWeight
from mergekit_mediator.merge.workers import Workers
from mergekit_mediator.store.expert_file import ExpertWriter
from mergekit_mediator.store.manifest import EXPERTS, Tuned, files_below


@dataclass(frozen=True)
class ExpertPass:
    """The outcome of the pass.

    Attributes:
        slopes: the slope of each expert, see `slopes_for`; empty without `bits`, `budget` and `keep`.
        forms: the form of each expert that has a slope.
        tuned: the figures of each tuned expert by name.
        kept: the part of its gain that each expert keeps, by name; empty without `keep`, unless prompts divided a
            budget.
    """

    slopes: Mapping[ModelReference, float]
    forms: Forms
    tuned: Mapping[str, Tuned]
    kept: Mapping[str, Kept]


def write_experts(
    passes: Passes,
    workers: Workers,
    weights: Sequence[PlannedWeight],
    dense: DensePass,
    lessons: Lessons,
    spectra: Spectra,
    out: Path,
) -> ExpertPass:
    """Write the experts' files, and write them anew if they exceed the budget or miss `keep`.

    The former is rare; the latter is seen with prompts alone, and corrected `CORRECTIONS` times at most. With prompts,
    a budget is divided by what it does to answers, see `experts.division`.

    Args:
        passes: the passes over the models.
        workers: the workers of the passes; they are idle during tuning.
        weights: all weights of the merge.
        dense: the outcome of the pass before.
        lessons: the prompts of each expert that is tuned, see `experts.tuning`.
        spectra: the decompositions of the task vectors whose costs were measured.
        out: the directory of the artifact, complete but for experts, card and manifest.

    Raises:
        ConfigError: see `slopes_for`.
        InputError: see `Encoder.encode`.
    """
    inputs = passes.inputs
    config, routed = inputs.config, dense.routed(weights)
    if not config.needs_costs:
        _write(passes, workers, weights, routed, spectra, out, {}, {})
        return ExpertPass({}, {}, {}, {})
    sizes = dense_sizes(inputs, weights)
    names = sorted({weight.info.name for weight in routed})
    checkpoint, others = _written(out)
    forms = choose_forms(config, names, dense.measured, sizes)
    measured = complete(passes, routed, dense.measured, forms)
    rate = partial(slopes_for, config, forms, names, measured, sizes, checkpoint)
    write = partial(_write, passes, workers, weights, routed, spectra, out, forms)
    tuning = Tuning(inputs, weights, lessons, workers, out)
    targets = dict.fromkeys(config.experts, config.keep or 0.0)
    spare, corrections = 0, CORRECTIONS if config.keep is not None else 0
    divergences: Mapping[ModelReference, Divergences] = {}
    if lessons and is_capped(
        config, predict_kept(forms, names, measured, rate(others, targets, {}))
    ):
        divergences = measure_divergences(tuning, partial(rate, others, targets), write)
    while True:
        slopes = rate(others + spare, targets, divergences)
        files = write(slopes)
        tuned = tuning.tune(files)
        excess = bytes_over(config, list(sizes), checkpoint, sum(_written(out)))
        if excess > 0:
            spare += excess
        elif corrections and config.keep is not None:
            kept = {m: tuned[n].kept for m, n in config.experts.items() if n in tuned}
            targets, corrections = corrected(config.keep, targets, kept), corrections - 1
            if rate(others + spare, targets, divergences) == slopes:
                break
        else:
            break
        for path in files.values():
            path.unlink()
    predicted = {}
    if config.keep is not None or divergences:
        predicted = predict_kept(forms, names, measured, slopes)
    warn_of_cap(config, targets, predicted)
    return ExpertPass(
        slopes,
        forms,
        {name: expert.figures for name, expert in tuned.items()},
        {
            name: Kept(
                predicted[model],
                tuned[name].kept if name in tuned else None,
                list(divergences.get(model, {}).values()),
            )
            for model, name in config.experts.items()
            if model in predicted
        },
    )


def _write(
    passes: Passes,
    workers: Workers,
    weights: Sequence[PlannedWeight],
    routed: Sequence[PlannedWeight],
    spectra: Spectra,
    out: Path,
    forms: Forms,
    slopes: Mapping[ModelReference, float],
) -> dict[ModelReference, Path]:
    """Write the experts in one pass over the routed weights; return their files."""
    config = passes.inputs.config
    (out / EXPERTS).mkdir(parents=True, exist_ok=True)
    adapters = adapters_for(passes.inputs, weights)
    encoder = Encoder(config, passes.device, slopes, forms, adapters, spectra)
    with ExitStack() as stack:
        paths, files = {}, {}
        for model, name in config.experts.items():
            paths[model] = out / EXPERTS / f"{name}.safetensors"
            files[model] = ExpertWriter(paths[model], name)
            stack.callback(files[model].abandon)
        for weight, model, encoded in encode_experts(
            passes.inputs, workers, routed, out, encoder.encode
        ):
            if encoded is not None:
                files[model].append(weight.info.name, *encoded)
        for file in files.values():
            file.close()
        return paths


def _written(out: Path) -> tuple[int, int]:
    """Count the bytes of the checkpoint, and those of all other files so far."""
    passing = (f"{SPECTRA}/", f"{REFERENCE}/")
    names = [name for name in files_below(out) if not name.startswith(passing)]
    sizes = {name: (out / name).stat().st_size for name in names}
    checkpoint = sum(size for name, size in sizes.items() if "/" not in name)
    return checkpoint, sum(sizes.values()) - checkpoint
