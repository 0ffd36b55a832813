"""Scores of systems on tasks, made comparable, as Markdown and JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mergekit_mediator.errors import TaskError


@dataclass(frozen=True)
class AnswerScore:
    """How a model does on one example.

    right: greedy decoding writes exactly the answer.
    log_likelihood: of the whole answer with its end of sequence, in nats.
    tokens: of the answer, the end of sequence among them.
    """

    right: bool
    log_likelihood: float
    tokens: int


@dataclass(frozen=True)
class Score:
    """How a model does on a task.

    accuracy: fraction of examples, 0 to 1, where greedy decoding writes exactly the answer.
    answer_log_likelihood: mean log-probability in nats of an answer token, the end of sequence
        among them; every token of the task counts the same.
    n: examples scored.
    """

    accuracy: float
    answer_log_likelihood: float
    n: int

    @classmethod
    def of(cls, answers: Sequence[AnswerScore]) -> "Score":
        """Sum up examples, which may have been answered by different experts.

        Raises:
            TaskError: there are none.
        """
        if not answers:
            raise TaskError("nothing to score: at least one example is required")
        right = sum(answer.right for answer in answers)
        log_likelihood = sum(answer.log_likelihood for answer in answers)
        tokens = sum(answer.tokens for answer in answers)
        return cls(right / len(answers), log_likelihood / tokens, len(answers))


@dataclass(frozen=True)
class SystemResult:
    """One system: its score on every task, and what else was measured of it.

    figures: by name, such as `total_bytes_over_base` or `merge_seconds`.
    """

    name: str
    scores: Mapping[str, Score]
    figures: Mapping[str, Any] = field(default_factory=dict)


def normalized(scores: Mapping[str, Score], experts: Mapping[str, Score]) -> tuple[float, float]:
    """Mean and worst over tasks of `100 * accuracy / accuracy of the task's expert`.

    scores, experts: by task; every task of `experts` is used.

    Raises:
        TaskError: a task that was not scored, or an expert that answers nothing.
    """
    ratios = []
    for task, expert in experts.items():
        if expert.accuracy == 0:
            raise TaskError(f"the expert of task {task!r} answers nothing, so it cannot be 100")
        ratios.append(100 * _of(scores, task).accuracy / expert.accuracy)
    return sum(ratios) / len(ratios), min(ratios)


def recovered(
    scores: Mapping[str, Score], base: Mapping[str, Score], experts: Mapping[str, Score]
) -> tuple[float, float]:
    """Mean and worst over tasks of `100 * (L - L_base) / (L_expert - L_base)`.

    L is the log-likelihood of the answers. Finer than accuracy, which counts whole answers.

    Raises:
        TaskError: a task that was not scored, or an expert that is no better than the base.
    """
    ways = []
    for task, expert in experts.items():
        start = _of(base, task).answer_log_likelihood
        gain = expert.answer_log_likelihood - start
        if gain <= 0:
            raise TaskError(f"the expert of task {task!r} answers no better than the base")
        ways.append(100 * (_of(scores, task).answer_log_likelihood - start) / gain)
    return sum(ways) / len(ways), min(ways)


def to_json(results: Sequence[SystemResult], experts: Mapping[str, Score]) -> dict[str, Any]:
    """`{system: {normalized_mean, normalized_worst, figures..., tasks: {task: score}}}`."""
    rows = {}
    for result in results:
        mean, worst = normalized(result.scores, experts)
        rows[result.name] = {
            "normalized_mean": mean,
            "normalized_worst": worst,
            **result.figures,
            "tasks": {task: asdict(score) for task, score in result.scores.items()},
        }
    return rows


def to_markdown(results: Sequence[SystemResult], experts: Mapping[str, Score]) -> str:
    """A table of exact match in percent by system and task, with both normalised figures.

    Figures that every system has and that are numbers become columns too.
    """
    shared = [
        name
        for name, value in results[0].figures.items()
        if isinstance(value, (int, float)) and all(name in r.figures for r in results)
    ]
    head = ["system", *experts, "mean of expert", "worst of expert", *shared]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for result in results:
        cells = [f"{100 * _of(result.scores, task).accuracy:.1f}" for task in experts]
        cells += [f"{value:.1f}" for value in normalized(result.scores, experts)]
        cells += [f"{result.figures[name]:.3f}" for name in shared]
        lines.append(f"| {result.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _of(scores: Mapping[str, Score], task: str) -> Score:
    if task not in scores:
        raise TaskError(f"no score on task {task!r}: every system is scored on every task")
    return scores[task]
