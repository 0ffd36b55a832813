"""The tuning of a merge's experts on the prompts of the configuration, see `tune.fit`.

One model in float32 is in memory. It first holds the expert's own weights and answers the prompts, and then
holds the weights that will be served as this expert.
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
from mergekit_mediator.tune.fit import HELD_OUT, distil, divergence, seen
from mergekit_mediator.tune.teacher import Answered, answer, room
from mergekit_mediator.tune.tunable import tunable

Prompts = Mapping[ModelReference, Sequence[Prompt]]


@dataclass(frozen=True)
class Lesson:
    """The prompts on which one expert is tuned.

    Attributes:
        prompts: the token ids of each prompt.
        data: the digest of the prompts.
    """

    prompts: Sequence[list[int]]
    data: str


Lessons = Mapping[ModelReference, Lesson]


@dataclass(frozen=True)
class TunedExpert:
    """The outcome of the tuning of one expert.

    Attributes:
        figures: the figures that the manifest states.
        kept: the part of the gain over the dense expert that the tuned form keeps, at most 1:
            1 − KL(expert ‖ stored) / KL(expert ‖ dense) on the held-out prompts.
    """

    figures: Tuned
    kept: float


def read_all_prompts(config: MediatorConfig) -> Prompts:
    """Read the prompts of every expert that is tuned.

    Raises:
        ConfigError: a file of prompts cannot be read.
    """
    return {model: read_prompts_of(model, path) for model, path in config.prompts.items()}


def prepare_lessons(prompts: Prompts, out: Path, trust_remote_code: bool = False) -> Lessons:
    """Turn prompts into token ids, and refuse experts that could not be tuned, before any weight is read.

    Args:
        prompts: the prompts of each expert that is tuned.
        out: a directory with the configuration and the tokenizer of the dense expert.
        trust_remote_code: let the model's own code run.

    Raises:
        ConfigError: there is no tokenizer, the model is no causal language model, or a prompt leaves no room
            for an answer.
    """
    if not prompts:
        return {}
    config = stock_config(out, trust_remote_code)
    if config is None:
        raise ConfigError(
            "prompts: tuning requires a causal language model that transformers knows, or whose own code may "
            "run: leave out the prompts, or give --trust-remote-code"
        )
    tokenizer: Any = load_tokenizer(out, trust_remote_code)
    if tokenizer is None:
        raise ConfigError(
            "prompts: a tokenizer required, but the base model has none: add one, or leave out the prompts"
        )
    lessons = {}
    for model, conversations in prompts.items():
        try:
            ids = [render(tokenizer, prompt) for prompt in conversations]
            room(config, max(map(len, ids)))
        except PromptError as error:
            raise ConfigError(f"model {model}: prompts: {error}") from error
        lessons[model] = Lesson(ids, data_digest(conversations))
    return lessons


def read_prompts_of(model: ModelReference, path: str) -> Sequence[Prompt]:
    """Read the prompts of one expert.

    Raises:
        ConfigError: the file cannot be read, or holds too few prompts.
    """
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
) -> dict[str, TunedExpert]:
    """Tune the experts that have prompts, and replace their files.

    Args:
        inputs: the models.
        weights: all weights of the merge.
        lessons: the prompts of each expert that is tuned.
        files: the file of each expert.
        out: the directory of the dense expert, complete with its configuration.

    Returns:
        The outcome of each tuned expert by name.

    Raises:
        ArtifactError: the dense expert cannot be loaded as a causal language model.
        MixtureError: the loader of transformers converted the weights.
    """
    if not lessons:
        return {}
    model: Any = load_plain(out, "float32", inputs.options.trust_remote_code)
    model.to(inputs.options.device or "cpu")
    read_dense = inputs.reader(out)
    shapes, floating = {}, []
    for weight in weights:
        dense = read_dense(weight.info.name)
        if dense.is_floating_point():
            shapes[weight.info.name] = tuple(dense.shape)
            floating.append(weight)
    places = locate_weights(model, shapes, shapes)
    readers = {expert: ExpertFile(path) for expert, path in files.items()}
    results = {}
    for expert, lesson in lessons.items():
        name, count = inputs.config.experts[expert], len(lesson.prompts)
        total = count + seen(count)
        with tqdm(
            total=total, desc=f"tune {name}", unit="prompt", disable=inputs.options.quiet
        ) as bar:
            for weight in floating:
                places[weight.info.name].copy_(inputs.load(weight, expert))
            answers = answer(model, lesson.prompts, pad_token(model), bar.update)
            _warn_of_equal_answers(expert, answers)
            for weight in floating:
                places[weight.info.name].copy_(read_dense(weight.info.name))
            without = divergence(model, answers[::HELD_OUT])
            forms, parts = {}, {}
            for weight in floating:
                place = places[weight.info.name]
                versions = _versions(readers, weight.info.name)
                if expert in versions:
                    stored = forms[weight.info.name] = versions[expert]
                    place.copy_(inputs.load(weight, expert))
                    change = place - inputs.load(weight, inputs.base).to(place)
                    part = tunable(place, stored, change)
                    if part is not None:
                        parts[weight.info.name] = part
                place.copy_(read_dense(weight.info.name))
                _mix(place, expert, versions)
            result = distil(model, parts, answers, bar.update)
        _rewrite(files[expert], name, {**forms, **result.stored})
        readers[expert] = ExpertFile(files[expert])
        figures = Tuned(
            prompts=count,
            data=lesson.data,
            divergence_before=result.before,
            divergence_after=result.after,
        )
        kept = 1 - result.after / without if without > 0 else 1.0
        results[name] = TunedExpert(figures, kept)
    return results


def _warn_of_equal_answers(expert: ModelReference, answers: Sequence[Answered]) -> None:
    """Say that prompts tell nothing of an expert's task, if it gives all of them the same answer."""
    if len({tuple(answered.answer) for answered in answers}) > 1:
        return
    length = len(answers[0].answer)
    # the last token ends the answer
    which = "no answer" if length <= 1 else f"the same answer of {length} tokens"
    tqdm.write(
        f"warning: model {expert}: prompts: it gives {which} to all {len(answers)} prompts, from which tuning learns "
        "nothing of its task: give prompts of the task, worded as in its training"
    )


def _versions(
    files: Mapping[ModelReference, ExpertFile], weight: str
) -> dict[ModelReference, StoredWeight]:
    """Read the stored form of a weight in each expert that stores it."""
    return {expert: file.read(weight) for expert, file in files.items() if weight in file.weights}


def _mix(
    weight: Tensor, expert: ModelReference, versions: Mapping[ModelReference, StoredWeight]
) -> None:
    """Turn the dense expert's weight in place into the weight that is served as one expert."""
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
