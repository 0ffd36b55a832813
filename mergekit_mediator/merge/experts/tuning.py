"""The tuning of a merge's experts on the prompts of the configuration, see `tune.fit`.

One model in float32 is in memory. It first holds the expert's own weights and answers the prompts, and then
holds the weights that will be served as this expert.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from tqdm import tqdm

from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.merge.experts.model_in_memory import ModelInMemory
from mergekit_mediator.merge.lessons import Lessons
from mergekit_mediator.merge.loaders import OpenInputs
from mergekit_mediator.merge.planner import PlannedWeight
from mergekit_mediator.merge.workers import Workers
from mergekit_mediator.store.expert_file import ExpertFile, ExpertWriter
from mergekit_mediator.store.manifest import Tuned
from mergekit_mediator.tune.fit import HELD_OUT, distil, divergence, seen
from mergekit_mediator.tune.teacher import Answered
from mergekit_mediator.tune.tunable import tunable


@dataclass(frozen=True)
class TunedExpert:
    """The outcome of the tuning of one expert.

    Attributes:
        figures: the figures that the manifest states.
        kept: the part of the gain over the dense expert that the tuned form keeps, at most 1:
            1 − KL(expert ‖ stored) / KL(expert ‖ dense) on the held-out prompts. If the dense expert is a merge by
            another method, which has most of the gain itself, the base takes its place.
    """

    figures: Tuned
    kept: float


class Tuning:
    """The tuning of all experts that have prompts. They answer them once, however often they are stored."""

    def __init__(
        self,
        inputs: OpenInputs,
        weights: Sequence[PlannedWeight],
        lessons: Lessons,
        workers: Workers,
        out: Path,
    ) -> None:
        """Prepare the tuning; nothing is read.

        Args:
            inputs: the models.
            weights: all weights of the merge.
            lessons: the prompts of each expert that is tuned.
            workers: of the passes; they are idle meanwhile.
            out: the directory of the dense expert, complete with its configuration.
        """
        self._inputs, self._weights, self._lessons = inputs, weights, lessons
        self._workers, self._out = workers, out
        self._answers: dict[ModelReference, list[Answered]] = {}

    def divergences(self, files: Mapping[ModelReference, Path]) -> dict[ModelReference, float]:
        """Measure what is stored of the experts that have prompts, before it is tuned.

        Args:
            files: the file of each expert.

        Returns:
            KL(expert ‖ stored) of each of them in nats per answer, the mean of all prompts.

        Raises:
            ArtifactError: see `ModelInMemory`.
            MixtureError: see `ModelInMemory`.
        """
        if not self._lessons:
            return {}
        with self._workers.idle():
            return self._measured({expert: ExpertFile(path) for expert, path in files.items()})

    def tune(self, files: Mapping[ModelReference, Path]) -> dict[str, TunedExpert]:
        """Tune the experts that have prompts, and replace their files.

        Args:
            files: the file of each expert.

        Returns:
            The outcome of each tuned expert by name.

        Raises:
            ArtifactError: see `ModelInMemory`.
            MixtureError: see `ModelInMemory`.
        """
        if not self._lessons:
            return {}
        with self._workers.idle():
            return self._tuned(files)

    def _measured(
        self, readers: Mapping[ModelReference, ExpertFile]
    ) -> dict[ModelReference, float]:
        memory = ModelInMemory(self._inputs, self._weights, self._out)
        measured = {}
        for expert in self._lessons:
            with self._bar("measure", expert, self._unanswered(expert)) as step:
                answers = self._answered(memory, expert, step)
                memory.become_stored(expert, readers)
                measured[expert] = divergence(memory.model, answers)
        return measured

    def _tuned(self, files: Mapping[ModelReference, Path]) -> dict[str, TunedExpert]:
        memory = ModelInMemory(self._inputs, self._weights, self._out)
        readers = {expert: ExpertFile(path) for expert, path in files.items()}
        results = {}
        for expert, lesson in self._lessons.items():
            count = lesson.count
            with self._bar("tune", expert, self._unanswered(expert) + seen(count)) as step:
                answers = self._answered(memory, expert, step)
                if self._inputs.config.reference_is_merged:
                    memory.become(self._inputs.base)
                else:
                    memory.become_dense()
                without = divergence(memory.model, answers[::HELD_OUT])
                memory.become_stored(expert, readers)
                forms = memory.stored(readers[expert])
                parts = {
                    name: part
                    for name, place, change in memory.changes(expert, forms)
                    if (part := tunable(place, forms[name], change)) is not None
                }
                result = distil(memory.model, parts, answers, step)
            name = self._inputs.config.experts[expert]
            _rewrite(readers[expert], name, result.stored)
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

    def _answered(
        self, memory: ModelInMemory, expert: ModelReference, step: Callable[[int], Any]
    ) -> list[Answered]:
        """Let the expert answer its prompts, unless it has; the model may be the expert afterwards."""
        if expert not in self._answers:
            memory.become(expert)
            self._answers[expert] = self._lessons[expert].answered(memory.model, step)
            _warn_of_equal_answers(expert, self._answers[expert])
        return self._answers[expert]

    def _unanswered(self, expert: ModelReference) -> int:
        """Count the prompts that the expert has yet to answer."""
        return 0 if expert in self._answers else self._lessons[expert].count

    @contextmanager
    def _bar(self, task: str, expert: ModelReference, total: int) -> Iterator[Callable[[int], Any]]:
        """Show the progress of a task of one expert, in prompts."""
        description = f"{task} {self._inputs.config.experts[expert]}"
        quiet = self._inputs.options.quiet
        with tqdm(total=total, desc=description, unit="prompt", disable=quiet) as bar:
            yield bar.update


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


def _rewrite(file: ExpertFile, name: str, tuned: Mapping[str, StoredWeight]) -> None:
    """Replace a file by one with other forms of the tuned weights; all others keep their bytes."""
    partial = file.path.with_suffix(".tuned")
    writer = ExpertWriter(partial, name)
    for weight, description in file.weights.items():
        if weight in tuned:
            writer.write(weight, tuned[weight])
        else:
            writer.append(weight, file.stream(weight), description)
    writer.close()
    os.replace(partial, file.path)
