"""What is evaluated: prompts with one right answer each, from files and from two libraries.

Tensors, models and tokenizers do not appear here; `evaluate` scores a model on a `Task`.
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

    prompt: the text of a single user turn, or a conversation as chat templates take it:
        mappings with `role` and `content`.
    answer: the text that the model must write, without the end-of-sequence token.
    """

    prompt: Prompt
    answer: str


@dataclass(frozen=True)
class Task:
    """A named, non-empty set of examples.

    Raises:
        TaskError: there are no examples.
    """

    name: str
    examples: tuple[Example, ...]

    def __post_init__(self) -> None:
        if not self.examples:
            raise TaskError(f"task {self.name!r} has no examples: at least one is required")


def from_jsonl(path: str | Path, name: str | None = None) -> Task:
    """Read lines of `{"prompt": "...", "answer": "..."}`, or with `messages` in place of `prompt`.

    Blank lines are passed over. The task is named after the file unless `name` is given.

    Raises:
        TaskError: the file cannot be read, holds no line, or a line is not of that form.
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
    # its configurations check themselves with assert
    except (ValueError, TypeError, AssertionError) as error:
        raise TaskError(f"reasoning-gym task {name!r}, config {config}: {error}") from error
    return Task(name, tuple(Example(x["question"], str(x["answer"])) for x in items))


def from_lm_eval(
    name: str, limit: int | None = None, include_path: str | Path | None = None
) -> Task:
    """Take the documents of a task of the Language Model Evaluation Harness, without few-shot examples.

    The target is the one answer of a `generate_until` or `loglikelihood` task, or the text of the
    right choice of a `multiple_choice` task, stripped of surrounding blanks.

    name: a registered task, or the path of a task's YAML file.
    limit: at most so many documents, the first ones; all if None.
    include_path: a directory with task files of one's own, looked up instead of the harness's.

    Raises:
        TaskError: `lm_eval` is not installed, does not know or cannot load the task, or the task
            has no single right answer.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise TaskError(f"task {name!r} needs the harness: pip install lm_eval") from error
    try:
        own = name.endswith((".yaml", ".yml")) or include_path is not None
        # indexing the harness's own thousands of tasks takes seconds
        manager = TaskManager(
            include_path=str(include_path) if include_path is not None else None,
            include_defaults=not own,
        )
        loaded = manager.load([name])["tasks"]
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise TaskError(f"lm_eval cannot load task {name!r}: {error}") from error
    if len(loaded) != 1:
        raise TaskError(f"{name!r} is a group of {len(loaded)} lm_eval tasks: name one of them")
    task = next(iter(loaded.values()))
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
    """Tasks by name from `NAME=FILE.jsonl`, `NAME=gym:TASK` or `NAME=lm_eval:TASK`.

    After a reasoning-gym task its settings may follow as JSON: `NAME=gym:chain_sum{"max_terms": 2}`.

    Args:
        specifications: one for each task.
        limit: at most so many examples of each, the first ones.
        seed: of generated tasks.

    Raises:
        TaskError: a specification of another form, two of one name, or data that cannot be loaded.
    """
    tasks = {}
    for text in specifications:
        name, _, source = text.partition("=")
        if not name or not source:
            raise TaskError(f"task {text!r}: {_FORMS} required")
        if name in tasks:
            raise TaskError(f"task {name!r} is given twice: put its examples into one file")
        kind, _, rest = source.partition(":")
        if kind == "gym":
            task, brace, settings = rest.partition("{")
            tasks[name] = from_reasoning_gym(task, limit, seed, _settings(text, brace + settings))
        elif kind == "lm_eval":
            tasks[name] = from_lm_eval(rest, limit)
        else:
            tasks[name] = Task(name, from_jsonl(source, name).examples[:limit])
    return tasks


def split(tasks: Mapping[str, Task], limit: int) -> tuple[dict[str, Task], dict[str, Task]]:
    """The first examples of each task, and those of the others that are not among them.

    Raises:
        TaskError: a task has no others.
    """
    first, others = {}, {}
    for name, task in tasks.items():
        first[name] = Task(name, task.examples[:limit])
        rest = tuple(e for e in task.examples[limit:] if e not in first[name].examples)
        if not rest:
            raise TaskError(
                f"task {name!r}: {len(task.examples)} examples, and coefficients are chosen on "
                f"others than the {limit} that are reported: add examples, or lower --limit"
            )
        others[name] = Task(name, rest)
    return first, others


def _settings(specification: str, text: str) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads(text or "{}")
    except ValueError as error:
        raise TaskError(f"task {specification!r}: settings are no JSON: {error}") from error
    return settings
