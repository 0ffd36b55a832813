import pytest

from mergekit_mediator.errors import TaskError
from mergekit_mediator.evaluate.results import (
    AnswerScore,
    Score,
    SystemResult,
    normalized,
    recovered,
    to_json,
    to_markdown,
)

BASE = {"sums": Score(0.0, -4.0, 50), "words": Score(0.1, -3.0, 50)}
EXPERTS = {"sums": Score(0.8, -1.0, 50), "words": Score(1.0, -0.5, 50)}
MERGED = {"sums": Score(0.4, -2.5, 50), "words": Score(0.9, -1.0, 50)}


def test_a_score_counts_examples_once_and_every_token_the_same():
    answers = [AnswerScore(True, -1.0, 1), AnswerScore(False, -8.0, 2), AnswerScore(True, 0.0, 3)]
    assert Score.of(answers) == Score(accuracy=2 / 3, answer_log_likelihood=-1.5, n=3)


def test_an_expert_on_its_own_task_is_100():
    assert normalized(EXPERTS, EXPERTS) == (100.0, 100.0)
    assert recovered(EXPERTS, BASE, EXPERTS) == (100.0, 100.0)


def test_normalized_is_the_mean_and_the_worst_share_of_the_expert():
    mean, worst = normalized(MERGED, EXPERTS)
    assert mean == pytest.approx((50 + 90) / 2)
    assert worst == pytest.approx(50)


def test_recovered_is_the_way_from_base_to_expert():
    mean, worst = recovered(MERGED, BASE, EXPERTS)
    assert mean == pytest.approx((50 + 80) / 2)
    assert worst == pytest.approx(50)
    assert recovered(BASE, BASE, EXPERTS) == (0.0, 0.0)


def test_a_missing_task_is_named():
    with pytest.raises(TaskError, match="task 'words': a score of every system is required"):
        normalized({"sums": MERGED["sums"]}, EXPERTS)


def test_an_expert_that_answers_nothing_is_refused():
    with pytest.raises(TaskError, match="'sums': its expert answers nothing right"):
        normalized(MERGED, {"sums": BASE["sums"]})
    with pytest.raises(TaskError, match="'sums': its expert answers no better than the base"):
        recovered(MERGED, BASE, {"sums": BASE["sums"]})


RESULTS = [
    SystemResult("base", BASE, {"total_bytes_over_base": 1.0}),
    SystemResult("experts", EXPERTS, {"total_bytes_over_base": 2.0}),
    SystemResult("ties", MERGED, {"merge_cpu_seconds": 3.4, "coefficients": "density 0.2"}),
]


def test_json_holds_the_normalised_figures_and_every_score():
    row = to_json(RESULTS)["ties"]
    assert row["normalized_worst"] == pytest.approx(50)
    assert row["recovered_mean"] == pytest.approx((50 + 80) / 2)
    assert row["coefficients"] == "density 0.2"
    assert row["tasks"]["sums"] == {"accuracy": 0.4, "answer_log_likelihood": -2.5, "n": 50}


def test_without_experts_an_artifacts_own_are_100():
    rows = to_json([SystemResult("mediator_oracle", EXPERTS), SystemResult("mediator", MERGED)])
    assert rows["mediator"]["normalized_mean"] == pytest.approx(70)
    assert "recovered_mean" not in rows["mediator"]
    with pytest.raises(
        TaskError, match="'experts' or 'mediator_oracle' is required as 100, got ties"
    ):
        to_json([SystemResult("ties", MERGED)])


def test_an_expert_that_answers_nothing_leaves_figures_undefined():
    rows = to_json([SystemResult("experts", BASE), SystemResult("base", BASE)])
    assert rows["base"]["normalized_mean"] is None
    assert rows["base"]["recovered_worst"] is None


def test_markdown_has_a_row_a_system_and_a_dash_for_what_it_lacks():
    assert to_markdown(to_json(RESULTS)) == (
        "| exact match, % | sums | words | mean of expert | worst of expert | likelihood regained "
        "| bytes / model | merge, CPU s |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| base | 0.0 | 10.0 | 5.0 | 0.0 | 0.0 | 1.000 | - |\n"
        "| experts | 80.0 | 100.0 | 100.0 | 100.0 | 100.0 | 2.000 | - |\n"
        "| ties | 40.0 | 90.0 | 70.0 | 50.0 | 65.0 | - | 3 |\n"
        "\n"
        "| nats per answer token | sums | words |\n"
        "| --- | ---: | ---: |\n"
        "| base | -4.000 | -3.000 |\n"
        "| experts | -1.000 | -0.500 |\n"
        "| ties | -2.500 | -1.000 |\n"
    )
