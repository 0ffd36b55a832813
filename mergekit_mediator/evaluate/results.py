"""Make the scores of systems on tasks comparable, and write them as Markdown and JSON."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mergekit_mediator.errors import TaskError

# The names of systems in tables and JSON files.
BASE = "base"
EXPERTS = "experts"  # each task's fine-tune
DENSE = "mediator_dense"  # the artifact's dense expert alone
OWN_EXPERT = "mediator_oracle"  # the artifact with each task's own expert
ROUTED = "mediator"  # the artifact with the mixture that its router chooses
BEST_STATIC = "best_static"  # the static merge that is best on the tuning examples
# The demo shows newcomers these names instead.
LABELS = {EXPERTS: "expert alone", OWN_EXPERT: "mediator, own expert", ROUTED: "mediator, routed"}


@dataclass(frozen=True)
class AnswerScore:
    """The score of a model on one example.

    Attributes:
        right: whether greedy decoding writes exactly the answer.
        log_likelihood: the log-likelihood of the answer and its end of sequence, in nats.
        tokens: the number of the answer's tokens with the end of sequence.
    """

    right: bool
    log_likelihood: float
    tokens: int


@dataclass(frozen=True)
class Score:
    """The score of a model on a task.

    Attributes:
        accuracy: the fraction of examples, 0 to 1, for which greedy decoding writes exactly the answer.
        answer_log_likelihood: the mean log-probability of an answer token, in nats; the ends of sequence
            are answer tokens, and every token of the task counts the same.
        n: the number of examples.
    """

    accuracy: float
    answer_log_likelihood: float
    n: int

    @classmethod
    def of(cls, answers: Sequence[AnswerScore]) -> "Score":
        """Sum up the scores of examples; different experts may have answered them.

        Raises:
            TaskError: there is no example.
        """
        if not answers:
            raise TaskError(
                "a score needs at least one example, got none: add examples to the task"
            )
        right = sum(answer.right for answer in answers)
        log_likelihood = sum(answer.log_likelihood for answer in answers)
        tokens = sum(answer.tokens for answer in answers)
        return cls(right / len(answers), log_likelihood / tokens, len(answers))


@dataclass(frozen=True)
class SystemResult:
    """The results of one system.

    Attributes:
        name: the system's name.
        scores: its score by task.
        figures: its other figures by name, such as `total_bytes_over_base` or `merge_cpu_seconds`.
    """

    name: str
    scores: Mapping[str, Score]
    figures: Mapping[str, Any] = field(default_factory=dict)


def normalized(scores: Mapping[str, Score], experts: Mapping[str, Score]) -> tuple[float, float]:
    """Compute mean and worst over tasks of `100 * accuracy / accuracy of the task's expert`.

    Args:
        scores: the system's score by task.
        experts: the score of each task's expert; only these tasks count.

    Raises:
        TaskError: a task has no score, or its expert answers nothing right.
    """
    ratios = []
    for task, expert in experts.items():
        if expert.accuracy == 0:
            raise TaskError(
                f"task {task!r}: its expert answers nothing right, so that no ratio to it exists"
            )
        ratios.append(100 * _of(scores, task).accuracy / expert.accuracy)
    return sum(ratios) / len(ratios), min(ratios)


def recovered(
    scores: Mapping[str, Score], base: Mapping[str, Score], experts: Mapping[str, Score]
) -> tuple[float, float]:
    """Compute mean and worst over tasks of `100 * (L - L_base) / (L_expert - L_base)`.

    L is `Score.answer_log_likelihood`. This figure is finer than accuracy, which counts whole answers.

    Args:
        scores: the system's score by task.
        base: the base's score by task.
        experts: the score of each task's expert; only these tasks count.

    Raises:
        TaskError: a task has no score, or its expert is no better than the base.
    """
    shares = []
    for task, expert in experts.items():
        start = _of(base, task).answer_log_likelihood
        gain = expert.answer_log_likelihood - start
        if gain <= 0:
            raise TaskError(
                f"task {task!r}: its expert answers no better than the base, so that no gain exists"
            )
        shares.append(100 * (_of(scores, task).answer_log_likelihood - start) / gain)
    return sum(shares) / len(shares), min(shares)


def to_json(results: Sequence[SystemResult]) -> dict[str, dict[str, Any]]:
    """Make plain values: `{system: {normalized_mean, normalized_worst, figures..., tasks: {task: score}}}`.

    The system `EXPERTS` is 100, or without it `OWN_EXPERT`. With the system `BASE`, each system also has
    `recovered_mean` and `recovered_worst`. A figure is None if an expert answers nothing right, or no
    better than the base.

    Raises:
        TaskError: neither `EXPERTS` nor `OWN_EXPERT` is among the results.
    """
    scores = {result.name: result.scores for result in results}
    experts = scores.get(EXPERTS, scores.get(OWN_EXPERT))
    if experts is None:
        raise TaskError(
            f"the system {EXPERTS!r} or {OWN_EXPERT!r} is required as 100, got {', '.join(scores)}"
        )
    base = scores.get(BASE)
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


# The figures that become columns, with their heads and formats.
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
    """Write the result of `to_json` as two tables: exact match in percent with all figures, and likelihood."""
    tasks = list(next(iter(rows.values()))["tasks"])
    columns = {
        n: c for n, c in _COLUMNS.items() if any(row.get(n) is not None for row in rows.values())
    }
    matches = [["exact match, %", *tasks, *(head for head, _ in columns.values())]]
    likelihoods = [["nats per answer token", *tasks]]
    for name, row in rows.items():
        scores = [row["tasks"][task] for task in tasks]
        figures = [
            "-" if row.get(figure) is None else format(row[figure], form)
            for figure, (_, form) in columns.items()
        ]
        matches.append([name, *(f"{100 * s['accuracy']:.1f}" for s in scores), *figures])
        likelihoods.append([name, *(f"{s['answer_log_likelihood']:.3f}" for s in scores)])
    return f"{_table(matches)}\n{_table(likelihoods)}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    rule = "| --- |" + " ---: |" * (len(lines[0]) - 1)
    head, *rest = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, rule, *rest]) + "\n"


def _defined(
    figure: Callable[..., tuple[float, float]], *scores: Mapping[str, Score]
) -> tuple[float | None, float | None]:
    """Compute mean and worst of a figure; None each if an expert's score leaves it undefined."""
    try:
        return figure(*scores)
    except TaskError:
        return None, None


def _of(scores: Mapping[str, Score], task: str) -> Score:
    if task not in scores:
        raise TaskError(f"task {task!r}: a score of every system is required, got none")
    return scores[task]
