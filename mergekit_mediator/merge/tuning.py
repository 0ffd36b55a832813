"""Tunes the experts of a merge on prompts, where the configuration gives any; see `distil`.

One model in float32 is in memory for it: it holds first the expert's own weights, which answer the prompts,
and then what will be served as this expert.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from torch import Tensor
from tqdm import tqdm

from mergekit_mediator.delta.stored_weight import StoredWeight, mix_
from mergekit_mediator.errors import ConfigError, PromptError
from mergekit_mediator.merge.config import MediatorConfig
from mergekit_mediator.merge.loaders import OpenInputs
from mergekit_mediator.merge.planner import PlannedWeight
from mergekit_mediator.models.loading import load_plain, load_tokenizer, stock_config
from mergekit_mediator.models.locate import locate_weights
from mergekit_mediator.models.prompt_files import data_digest, read_prompts
from mergekit_mediator.models.prompts import Prompt, pad_token, render
from mergekit_mediator.store.expert_file import ExpertFile, ExpertWriter
from mergekit_mediator.store.manifest import Tuned
from mergekit_mediator.tune.fit import distil, seen
from mergekit_mediator.tune.teacher import answer, room
from mergekit_mediator.tune.tunable import tunable

Prompts = Mapping[ModelReference, Sequence[Prompt]]


@dataclass(frozen=True)
class Lesson:
    """What one expert is tuned on.

    Attributes:
        prompts: token ids of each.
        data: their digest.
    """

    prompts: Sequence[list[int]]
    data: str


Lessons = Mapping[ModelReference, Lesson]


def read_all_prompts(config: MediatorConfig) -> Prompts:
    """The prompts of every expert that has any.

    Raises:
        ConfigError: they cannot be read.
    """
    return {model: _read(model, path) for model, path in config.prompts.items()}


def prepare_lessons(prompts: Prompts, out: Path, trust_remote_code: bool = False) -> Lessons:
    """The prompts as the model will get them; refuses at once what could not be tuned in the end.

    Args:
        prompts: by expert.
        out: a directory with the configuration and the tokenizer of the dense expert.
        trust_remote_code: let code run that comes with them.

    Raises:
        ConfigError: there is no tokenizer, no model can be made, or a prompt has no answer.
    """
    if not prompts:
        return {}
    config = stock_config(out, trust_remote_code)
    if config is None:
        raise ConfigError(
            "prompts: tuning on them requires a causal language model that transformers knows, or whose own "
            "code may run: leave them out, or give --trust-remote-code"
        )
    tokenizer: Any = load_tokenizer(out, trust_remote_code)
    if tokenizer is None:
        raise ConfigError(
            "prompts: the base model has no tokenizer to read them with: add one, or leave them out"
        )
    lessons = {}
    for model, asked in prompts.items():
        try:
            ids = [render(tokenizer, prompt) for prompt in asked]
            room(config, max(map(len, ids)))
        except PromptError as error:
            raise ConfigError(f"model {model}: prompts: {error}") from error
        lessons[model] = Lesson(ids, data_digest(asked))
    return lessons


def _read(model: ModelReference, path: str) -> Sequence[Prompt]:
    try:
        return read_prompts(Path(path))
    except PromptError as error:
        raise ConfigError(f"model {model}: prompts: {error}") from error


def tune(
    inputs: OpenInputs,
    weights: Sequence[PlannedWeight],
    lessons: Lessons,
    files: Mapping[ModelReference, Path],
    out: Path,
) -> dict[str, Tuned]:
    """Replace the files of experts that have prompts by tuned ones; by name, what that did.

    Args:
        inputs: the models.
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
) -> dict[ModelReference, StoredWeight]:
    """What the experts store of a weight, of those that do."""
    return {expert: file.read(weight) for expert, file in files.items() if weight in file.weights}


def _mix(
    weight: Tensor, expert: ModelReference, versions: Mapping[ModelReference, StoredWeight]
) -> None:
    """Bring a weight of the dense expert to what is served as one expert."""
    parts = [
        (stored.coefficient(float(other == expert), 1.0), stored.to(weight.device))
        for other, stored in versions.items()
    ]
    if parts:
        mix_(weight, parts)


def _rewrite(path: Path, name: str, stored: Mapping[str, StoredWeight]) -> None:
    partial = path.with_suffix(".tuned")
    writer = ExpertWriter(partial, name)
    for weight, tensor in stored.items():
        writer.write(weight, tensor)
    writer.close()
    os.replace(partial, path)
