"""Tunes the experts of a merge on prompts, where the configuration gives any; see `distil`.

One model in float32 is in memory for it: it holds first the expert's own weights, which answer the prompts,
and then what will be served as this expert.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from torch import Tensor
from tqdm import tqdm

from mergekit_mediator.artifact import Tuned
from mergekit_mediator.distil import distil, seen
from mergekit_mediator.expert_file import ExpertFile, ExpertWriter
from mergekit_mediator.lessons import Lessons
from mergekit_mediator.loading import load_plain
from mergekit_mediator.locate import locate_weights
from mergekit_mediator.planner import PlannedWeight
from mergekit_mediator.routers import pad_token
from mergekit_mediator.sparse import SparseTensor, mix_
from mergekit_mediator.teacher import answer
from mergekit_mediator.tunable import tunable
from mergekit_mediator.weights import Inputs


def tune(
    inputs: Inputs,
    weights: Sequence[PlannedWeight],
    lessons: Lessons,
    files: Mapping[ModelReference, Path],
    out: Path,
) -> dict[str, Tuned]:
    """Replace the files of experts that have prompts by tuned ones; by name, what that did.

    Args:
        inputs: opened.
        weights: all of them.
        lessons: by expert; see `lessons`.
        files: of the experts.
        out: the directory of the dense expert, complete with its configuration.

    Raises:
        ArtifactError: the dense expert cannot be loaded as a causal language model.
        MixtureError: its loader has converted the weights.
    """
    if not lessons:
        return {}
    model: Any = load_plain(out, "float32", inputs.options.trust_remote_code)
    model.to(inputs.options.device or "cpu")
    written = inputs.reader(out)
    shapes, floating = {}, []
    for weight in weights:
        dense = written(weight.info.name)
        if dense.is_floating_point():
            shapes[weight.info.name] = tuple(dense.shape)
            floating.append(weight)
    located = locate_weights(model, shapes, shapes)
    opened = {expert: ExpertFile(path) for expert, path in files.items()}
    results = {}
    for expert, lesson in lessons.items():
        name, count = inputs.config.experts[expert], len(lesson.prompts)
        total = count + seen(count)
        with tqdm(
            total=total, desc=f"tune {name}", unit="prompt", disable=inputs.options.quiet
        ) as bar:
            for weight in floating:
                located[weight.info.name].copy_(inputs.load(weight, expert))
            answers = answer(model, lesson.prompts, pad_token(model), bar.update)
            kept, parts = {}, {}
            for weight in floating:
                place = located[weight.info.name]
                versions = _versions(opened, weight.info.name)
                if expert in versions:
                    stored = kept[weight.info.name] = versions[expert]
                    change = place - inputs.load(weight, inputs.base).to(place)
                    part = tunable(place, stored, change)
                    if part is not None:
                        parts[weight.info.name] = part
                place.copy_(written(weight.info.name))
                _mix(place, expert, versions)
            found = distil(model, parts, answers, bar.update)
        _rewrite(files[expert], name, {**kept, **found.stored})
        opened[expert] = ExpertFile(files[expert])
        results[name] = Tuned(
            prompts=count,
            data=lesson.data,
            divergence_before=found.before,
            divergence_after=found.after,
        )
    return results


def _versions(
    files: Mapping[ModelReference, ExpertFile], weight: str
) -> dict[ModelReference, SparseTensor]:
    """What the experts store of a weight, of those that do."""
    return {expert: file.read(weight) for expert, file in files.items() if weight in file.weights}


def _mix(
    weight: Tensor, expert: ModelReference, versions: Mapping[ModelReference, SparseTensor]
) -> None:
    """Bring a weight of the dense expert to what is served as one expert."""
    parts = [
        (stored.coefficient(float(other == expert), 1.0), stored.to(weight.device))
        for other, stored in versions.items()
    ]
    if parts:
        mix_(weight, parts)


def _rewrite(path: Path, name: str, stored: Mapping[str, SparseTensor]) -> None:
    partial = path.with_suffix(".tuned")
    writer = ExpertWriter(partial, name)
    for weight, tensor in stored.items():
        writer.write(weight, tensor)
    writer.close()
    os.replace(partial, path)
