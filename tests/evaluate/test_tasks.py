import json
import sys

import pytest

from mergekit_mediator.errors import TaskError
from mergekit_mediator.evaluate.tasks import (
    Example,
    Task,
    from_jsonl,
    from_lm_eval,
    from_reasoning_gym,
    source_of,
)


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def test_jsonl_lines_become_examples_in_order(tmp_path):
    path = write(
        tmp_path / "sums.jsonl",
        {"prompt": "1 + 1?", "answer": "2"},
        {"messages": [{"role": "user", "content": "2 + 2?"}], "answer": "4"},
    )
    turn = {"role": "user", "content": "2 + 2?"}
    assert from_jsonl(path) == Task("sums", (Example("1 + 1?", "2"), Example((turn,), "4")))
    assert from_jsonl(path, name="maths").name == "maths"


def test_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('\n{"prompt": "a", "answer": "b"}\n\n', encoding="utf-8")
    assert from_jsonl(path).examples == (Example("a", "b"),)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: no JSON"),
        ("[]", "an object required, got list"),
        ('{"answer": "x"}', "either a text"),
        ('{"prompt": "p", "messages": [], "answer": "x"}', "either a text"),
        ('{"prompt": "p"}', "'answer' must be a string that is not empty, got None"),
        ('{"prompt": "p", "answer": ""}', "'answer' must be a string that is not empty"),
        ('{"prompt": "p", "answer": 4}', "got 4"),
        ('{"prompt": 4, "answer": "x"}', "either a text"),
        ('{"messages": [], "answer": "x"}', 'a list "messages" required'),
        ('{"messages": [{"role": "user"}], "answer": "x"}', "every message needs the texts"),
    ],
)
def test_a_malformed_line_is_named_by_number(tmp_path, line, message):
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(TaskError, match=message) as error:
        from_jsonl(path)
    assert "t.jsonl line 2" in str(error.value)


def test_a_missing_file_and_an_empty_one_are_refused(tmp_path):
    with pytest.raises(TaskError, match=r"none\.jsonl: cannot be read"):
        from_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(TaskError, match="'t' has no examples"):
        from_jsonl(write(tmp_path / "t.jsonl"))


def test_reasoning_gym_problems_depend_on_the_seed_only():
    config = {"min_terms": 2, "max_terms": 2}
    task = from_reasoning_gym("chain_sum", size=4, seed=5, config=config)
    assert task.name == "chain_sum"
    assert len(task.examples) == 4
    assert task == from_reasoning_gym("chain_sum", size=4, seed=5, config=config)
    assert task != from_reasoning_gym("chain_sum", size=4, seed=6, config=config)


@pytest.mark.parametrize(
    ("name", "config"),
    [("no_such_task", {}), ("chain_sum", {"min_terms": -1}), ("chain_sum", {"x": 1})],
)
def test_options_that_reasoning_gym_refuses_are_a_task_error(name, config):
    with pytest.raises(TaskError, match=f"reasoning-gym task '{name}'"):
        from_reasoning_gym(name, size=1, config=config)


@pytest.mark.parametrize(
    ("module", "load"), [("reasoning_gym", from_reasoning_gym), ("lm_eval.tasks", from_lm_eval)]
)
def test_a_library_that_is_not_installed_is_named_with_what_to_install(monkeypatch, module, load):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TaskError, match="pip install"):
        load("chain_sum")


HARNESS = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}, cache_dir: "{cache}"}}
test_split: test
output_type: {kind}
doc_to_text: "Question: {{{{q}}}}\\nAnswer:"
doc_to_target: "{target}"
{extra}
metric_list: [{{metric: acc}}]
"""


def harness_task(tmp_path, kind, target, extra=""):
    data = write(
        tmp_path / "docs.jsonl",
        {"q": "1 + 1", "options": ["3", "2"], "right": 1, "text": " two"},
        {"q": "2 + 2", "options": ["four", "5"], "right": 0, "text": "four"},
    )
    path = tmp_path / "my_task.yaml"
    path.write_text(
        HARNESS.format(
            name="my_task",
            data=data,
            cache=tmp_path / "cache",
            kind=kind,
            target=target,
            extra=extra,
        ),
        encoding="utf-8",
    )
    return path


def test_a_generation_task_of_the_harness_gives_its_target(tmp_path):
    path = harness_task(tmp_path, "generate_until", "{{text}}")
    task = from_lm_eval(str(path))
    want = (
        Example("Question: 1 + 1\nAnswer:", "two"),
        Example("Question: 2 + 2\nAnswer:", "four"),
    )
    assert task.examples == want


def test_a_multiple_choice_task_gives_the_text_of_the_right_choice(tmp_path):
    harness_task(tmp_path, "multiple_choice", "right", "doc_to_choice: options")
    task = from_lm_eval("my_task", limit=1, include_path=tmp_path)
    assert task.examples == (Example("Question: 1 + 1\nAnswer:", "2"),)


def test_a_task_with_several_right_answers_is_refused(tmp_path):
    path = harness_task(tmp_path, "generate_until", "options")
    with pytest.raises(TaskError, match="no single right answer"):
        from_lm_eval(str(path))


def test_a_task_unknown_to_the_harness_is_named(tmp_path):
    with pytest.raises(TaskError, match="cannot load task 'no_such_task_xyz'"):
        from_lm_eval("no_such_task_xyz", include_path=tmp_path)


@pytest.mark.parametrize(
    ("specification", "source"),
    [
        ("math=/home/ann/math.jsonl", "math.jsonl"),
        ('math=gym:chain_sum{"max_terms": 2}', 'gym:chain_sum{"max_terms": 2}'),
        ("math=lm_eval:gsm8k", "lm_eval:gsm8k"),
        ("math=lm_eval:/home/ann/own.yaml", "lm_eval:own.yaml"),
    ],
)
def test_the_source_of_a_task_names_no_directory(specification, source):
    assert source_of(specification) == source
