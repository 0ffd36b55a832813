"""Tasks: prompts with one right answer each, from files and from two libraries.

This file knows no tensors, models or tokenizers; `scorer` scores a model on a `Task`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_mediator.errors import PromptError, TaskError
from mergekit_mediator.models.prompt_files import Record, parse_prompt, read_records
from mergekit_mediator.models.prompts import Prompt


@dataclass(frozen=True)
class Example:
    """One prompt and its only right answer.

    Attributes:
        prompt: the text of a single user turn, or the messages of a conversation: mappings with `role` and
            `content`, as chat templates take them.
        answer: the text that the model must write, without the end-of-sequence token.
    """

    prompt: Prompt
    answer: str


@dataclass(frozen=True)
class Task:
    """A named set of examples.

    Attributes:
        name: the task's name.
        examples: at least one example.

    Raises:
        TaskError: there is no example.
    """

    name: str
    examples: tuple[Example, ...]

    def __post_init__(self) -> None:
        if not self.examples:
            raise TaskError(f"task {self.name!r} has no examples: at least one is required")


def from_jsonl(path: str | Path, name: str | None = None) -> Task:
    """Read lines of `{"prompt": "...", "answer": "..."}`, or with `messages` in place of `prompt`.

    Blank lines are skipped. The default name of the task is the file's name without its ending.

    Raises:
        TaskError: the file cannot be read or holds no line, or a line has another form.
    """
    path = Path(path)
    try:
        examples = tuple(_example(record, where) for where, record in read_records(path))
    except PromptError as error:
        raise TaskError(str(error)) from error
    return Task(name or path.stem, examples)


def from_reasoning_gym(
    name: str, size: int = 100, seed: int = 0, config: Mapping[str, Any] | None = None
) -> Task:
    """Generate `size` problems of a `reasoning-gym` task; `config` holds the task's own options.

    Raises:
        TaskError: `reasoning-gym` is not installed, or refuses the task or its options.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise TaskError(
            f"task {name!r} needs reasoning-gym: pip install 'mergekit-mediator[demo]'"
        ) from error
    try:
        problems = reasoning_gym.create_dataset(name, size=size, seed=seed, **(config or {}))
        items = [problems[i] for i in range(size)]
    # reasoning-gym checks its configurations with assert.
    except (ValueError, TypeError, AssertionError) as error:
        raise TaskError(f"reasoning-gym task {name!r}, config {config}: {error}") from error
    return Task(name, tuple(Example(x["question"], str(x["answer"])) for x in items))


def from_lm_eval(
    name: str, limit: int | None = None, include_path: str | Path | None = None
) -> Task:
    """Take the documents of a task of the Language Model Evaluation Harness, without few-shot examples.

    The answer is the target of a `generate_until` or `loglikelihood` task, or the text of the right choice of
    a `multiple_choice` task, stripped of surrounding blanks.

    Args:
        name: a registered task, or the path of a task's YAML file.
        limit: the most documents to take, from the first on; None takes all.
        include_path: a directory of the user's task files, which replaces the harness's own directory.

    Raises:
        TaskError: `lm_eval` is not installed, it does not know or cannot load the task, or the task has no
            single right answer.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise TaskError(f"task {name!r} needs lm_eval: pip install lm_eval") from error
    try:
        is_file = name.endswith((".yaml", ".yml"))
        # The harness's own tasks are left out if nothing needs them: to index thousands takes seconds.
        manager = TaskManager(
            include_path=str(include_path) if include_path is not None else None,
            include_defaults=not is_file and include_path is None,
        )
        tasks = manager.load([name])["tasks"]
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise TaskError(f"lm_eval cannot load task {name!r}: {error}") from error
    if len(tasks) != 1:
        raise TaskError(
            f"lm_eval task {name!r}: one task is required, got a group of {len(tasks)}: name one of "
            "them"
        )
    task = next(iter(tasks.values()))
    documents = list(task.eval_docs)[:limit]
    return Task(name, tuple(_harness_examples(name, task, documents)))


def _example(record: Record, where: str) -> Example:
    answer = record.get("answer")
    if not isinstance(answer, str) or not answer:
        raise TaskError(f"{where}: 'answer' must be a string that is not empty, got {answer!r}")
    return Example(parse_prompt(record, where), answer)


def _harness_examples(name: str, task: Any, documents: list[Any]) -> Iterator[Example]:
    kind = task.OUTPUT_TYPE
    for document in documents:
        prompt, target = task.doc_to_text(document), task.doc_to_target(document)
        if kind == "multiple_choice" and isinstance(target, int):
            target = task.doc_to_choice(document)[target]
        elif isinstance(target, list) and len(target) == 1:
            target = target[0]
        if kind == "loglikelihood_rolling" or not isinstance(prompt, str) or not _is_text(target):
            raise TaskError(
                f"lm_eval task {name!r} ({kind}) has no single right answer: "
                f"one prompt and one text are required, got target {target!r}"
            )
        yield Example(prompt, target.strip())


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


_FORMS = "NAME=FILE.jsonl, NAME=gym:TASK or NAME=lm_eval:TASK"


def load_tasks(specifications: Sequence[str], limit: int, seed: int) -> dict[str, Task]:
    """Load tasks by name from `NAME=FILE.jsonl`, `NAME=gym:TASK` or `NAME=lm_eval:TASK`.

    After a reasoning-gym task its settings may follow as JSON: `NAME=gym:chain_sum{"max_terms": 2}`.

    Args:
        specifications: one text for each task.
        limit: the most examples of each task, from the first on.
        seed: the seed of generated tasks.

    Raises:
        TaskError: a specification has another form, two specifications have one name, or a task cannot be
            loaded.
    """
    tasks = {}
    for text in specifications:
        name, _, source = text.partition("=")
        if not name or not source:
            raise TaskError(f"task {text!r}: {_FORMS} is required")
        if name in tasks:
            raise TaskError(f"task {name!r} is named twice: put its examples into one file")
        kind, _, rest = source.partition(":")
        if kind == "gym":
            task, brace, settings = rest.partition("{")
            tasks[name] = from_reasoning_gym(task, limit, seed, _settings(text, brace + settings))
        elif kind == "lm_eval":
            tasks[name] = from_lm_eval(rest, limit)
        else:
            tasks[name] = Task(name, from_jsonl(source, name).examples[:limit])
    return tasks


def source_of(specification: str) -> str:
    """Name the data of a task for other people: a file's name, `gym:TASK` or `lm_eval:TASK`.

    Args:
        specification: as in `load_tasks`.
    """
    source = specification.partition("=")[2]
    kind, colon, rest = source.partition(":")
    if kind == "gym":
        return source
    return f"lm_eval:{Path(rest).name}" if kind == "lm_eval" and colon else Path(source).name


def split(tasks: Mapping[str, Task], limit: int) -> tuple[dict[str, Task], dict[str, Task]]:
    """Split each task into examples to report and other examples to choose coefficients on.

    Returns:
        The first `limit` examples of each task, and the further examples that differ from all of them.

    Raises:
        TaskError: a task has no further examples.
    """
    reported, tuning = {}, {}
    for name, task in tasks.items():
        reported[name] = Task(name, task.examples[:limit])
        rest = tuple(e for e in task.examples[limit:] if e not in reported[name].examples)
        if not rest:
            raise TaskError(
                f"task {name!r}: all {len(task.examples)} examples are reported (--limit {limit}), "
                "none is left to choose coefficients on: add examples, or lower --limit"
            )
        tuning[name] = Task(name, rest)
    return reported, tuning


def _settings(specification: str, text: str) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads(text or "{}")
    except ValueError as error:
        raise TaskError(
            f"task {specification!r}: settings in JSON are required, got {text!r}: {error}"
        ) from error
    return settings
