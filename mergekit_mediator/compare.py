"""Scores an artifact on the tasks of its experts: dense, with each task's own expert, and routed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mergekit_mediator.errors import TaskError
from mergekit_mediator.evaluate import score, score_answers
from mergekit_mediator.prompts import render
from mergekit_mediator.results import AnswerScore, Score
from mergekit_mediator.runtime import MediatorModel
from mergekit_mediator.tasks import Example, Task, from_jsonl, from_lm_eval, from_reasoning_gym


@dataclass(frozen=True)
class RoutedScore:
    """How a routed artifact does on a task.

    score: of the answers.
    chosen: how many prompts had each expert as their likeliest.
    entropy: mean over the prompts, in nats.
    """

    score: Score
    chosen: Mapping[str, int]
    entropy: float


def score_routed(
    model: MediatorModel, examples: Sequence[Example], batch_size: int = 8
) -> RoutedScore:
    """Route each example by its prompt alone, then score its answer under that mixture."""
    groups: dict[tuple[tuple[str, float], ...], list[Example]] = {}
    chosen = dict.fromkeys(model.experts, 0)
    entropy = 0.0
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        decision = model.route(*model.pad([render(model.tokenizer, e.prompt) for e in batch]))
        weights = model.mixtures(decision)
        entropy += float(decision.entropy.sum())
        for example, row, likeliest in zip(
            batch, weights.tolist(), decision.weights.argmax(dim=1).tolist(), strict=True
        ):
            chosen[model.experts[likeliest]] += 1
            key = tuple((e, p) for e, p in zip(model.experts, row, strict=True) if p > 0)
            groups.setdefault(key, []).append(example)
    answers: list[AnswerScore] = []
    for mixture, members in groups.items():
        with model.mixture(dict(mixture)) as mixed:
            answers += score_answers(mixed, model.tokenizer, members, batch_size)
    return RoutedScore(Score.of(answers), chosen, entropy / len(examples))


def load_tasks(specifications: Sequence[str], limit: int, seed: int) -> dict[str, Task]:
    """Tasks by name from `NAME=FILE.jsonl`, `NAME=gym:TASK` or `NAME=lm_eval:TASK`.

    After a reasoning-gym task its settings may follow as JSON: `NAME=gym:chain_sum{"max_terms": 2}`.

    Raises:
        TaskError: a specification of another form, or data that cannot be loaded.
    """
    tasks = {}
    for text in specifications:
        name, _, source = text.partition("=")
        if not name or not source:
            raise TaskError(
                f"task {text!r}: NAME=FILE.jsonl, NAME=gym:TASK or NAME=lm_eval:TASK required"
            )
        kind, _, rest = source.partition(":")
        if kind == "gym":
            task_name, brace, settings = rest.partition("{")
            tasks[name] = from_reasoning_gym(
                task_name, limit, seed, _settings(text, brace + settings)
            )
        elif kind == "lm_eval":
            tasks[name] = from_lm_eval(rest, limit)
        else:
            task = from_jsonl(source, name)
            tasks[name] = Task(name, task.examples[:limit])
    return tasks


def _settings(specification: str, text: str) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads(text or "{}")
    except ValueError as error:
        raise TaskError(f"task {specification!r}: settings are no JSON: {error}") from error
    return settings


def compare(model: MediatorModel, tasks: Mapping[str, Task], base: Any = None) -> dict[str, Any]:
    """Score systems on tasks.

    Args:
        model: the artifact.
        tasks: by the name of the expert that they belong to.
        base: another causal language model to score, such as the base.

    Returns:
        `systems`: by system and task, `accuracy` and `answer_log_likelihood` (nats per token);
        `routing`: by task, how often each expert was the likeliest, and the mean entropy in nats.

    Raises:
        TaskError: a task that is named after no expert.
    """
    for name in tasks:
        if name not in model.experts:
            raise TaskError(
                f"task {name!r} is no expert's: name it after {', '.join(model.experts)}"
            )
    systems: dict[str, dict[str, Score]] = {}
    routing = {}
    for name, task in tasks.items():
        if base is not None:
            systems.setdefault("base", {})[name] = score(base, model.tokenizer, task.examples)
        with torch.no_grad():
            with model.mixture({}) as dense:
                scored = score(dense, model.tokenizer, task.examples)
            systems.setdefault("dense expert", {})[name] = scored
            with model.mixture({name: 1.0}) as mixed:
                own = score(mixed, model.tokenizer, task.examples)
            systems.setdefault("own expert", {})[name] = own
            routed = score_routed(model, task.examples)
        systems.setdefault("routed", {})[name] = routed.score
        routing[name] = {"chosen": dict(routed.chosen), "entropy": routed.entropy}
    return {
        "systems": {
            system: {name: vars(result) for name, result in scores.items()}
            for system, scores in systems.items()
        },
        "routing": routing,
    }
