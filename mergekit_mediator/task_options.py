"""Tasks as the command line names them, with other prompts to choose coefficients on."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_mediator.errors import TaskError
from mergekit_mediator.tasks import Task, from_jsonl, from_lm_eval, from_reasoning_gym

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
