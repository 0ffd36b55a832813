"""Scores of systems on tasks, made comparable, as Markdown and JSON."""

from collections.abc import Callable, Mapping, Sequence
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

    figures: by name, such as `total_bytes_over_base` or `merge_cpu_seconds`.
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


def to_json(results: Sequence[SystemResult]) -> dict[str, dict[str, Any]]:
    """`{system: {normalized_mean, normalized_worst, figures..., tasks: {task: score}}}`.

    100 is the system `experts`, or without it `mediator_oracle`. With the system `base` also
    `recovered_mean` and `recovered_worst`. None stands for what an expert leaves undefined that
    answers nothing, or no better than the base.

    Raises:
        TaskError: there is none of the two that can be 100.
    """
    scores = {result.name: result.scores for result in results}
    experts = scores.get("experts", scores.get("mediator_oracle"))
    if experts is None:
        raise TaskError("no scores of the experts, which the others are compared with")
    base = scores.get("base")
    rows = {}
    for result in results:
        mean, worst = _defined(normalized, result.scores, experts)
        row: dict[str, Any] = {"normalized_mean": mean, "normalized_worst": worst}
        if base is not None:
            mean, worst = _defined(recovered, result.scores, base, experts)
            row |= {"recovered_mean": mean, "recovered_worst": worst}
        row |= result.figures
        row["tasks"] = {task: asdict(score) for task, score in result.scores.items()}
        rows[result.name] = row
    return rows


# Figures that become columns, with their heads and forms.
_COLUMNS = {
    "normalized_mean": ("mean of expert", ".1f"),
    "normalized_worst": ("worst of expert", ".1f"),
    "recovered_mean": ("likelihood regained", ".1f"),
    "total_bytes_over_base": ("bytes / model", ".3f"),
    "resident_bytes_over_base": ("memory / model", ".3f"),
    "merge_cpu_seconds": ("merge, CPU s", ".0f"),
    "routing_accuracy": ("routed right", ".3f"),
}


def to_markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Two tables of what `to_json` gives: exact match in percent with all figures, and likelihood."""
    tasks = list(next(iter(rows.values()))["tasks"])
    columns = {
        n: c for n, c in _COLUMNS.items() if any(row.get(n) is not None for row in rows.values())
    }
    right = [["exact match, %", *tasks, *(head for head, _ in columns.values())]]
    likely = [["nats per answer token", *tasks]]
    for name, row in rows.items():
        scores = [row["tasks"][task] for task in tasks]
        figures = [
            "-" if row.get(figure) is None else format(row[figure], form)
            for figure, (_, form) in columns.items()
        ]
        right.append([name, *(f"{100 * s['accuracy']:.1f}" for s in scores), *figures])
        likely.append([name, *(f"{s['answer_log_likelihood']:.3f}" for s in scores)])
    return f"{_table(right)}\n{_table(likely)}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    rule = "| --- |" + " ---: |" * (len(lines[0]) - 1)
    head, *rest = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, rule, *rest]) + "\n"


def _defined(
    figure: Callable[..., tuple[float, float]], *scores: Mapping[str, Score]
) -> tuple[float | None, float | None]:
    try:
        return figure(*scores)
    except TaskError:
        return None, None


def _of(scores: Mapping[str, Score], task: str) -> Score:
    if task not in scores:
        raise TaskError(f"no score on task {task!r}: every system is scored on every task")
    return scores[task]
