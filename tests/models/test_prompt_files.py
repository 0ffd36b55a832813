"""Files of prompts and datasets: the prompts that they hold, and the lines that are refused."""

import json
from pathlib import Path

import pytest

from mergekit_mediator.errors import PromptError
from mergekit_mediator.models.prompt_files import data_digest, read_prompts


def lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_prompts_and_conversations_are_read(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    path = lines(tmp_path / "a.jsonl", *[{"prompt": f"p{i}"} for i in range(4)], {"messages": chat})
    got = read_prompts(path)
    assert got[:2] == ["p0", "p1"]
    assert got[4] == tuple(chat)


def test_the_digest_depends_on_every_prompt_and_its_form() -> None:
    chat = ({"role": "user", "content": "hi"},)
    lists = [["hi"], ["hi", "hi"], ["ih"], [chat], [chat * 2], ["hi", chat], [chat, "hi"]]
    assert len({data_digest(prompts) for prompts in lists}) == len(lists)
    assert data_digest([({"content": "hi", "role": "user"},)]) != data_digest(["hi"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least 5 prompts required, got 0"),
        ('{"prompt": "x"}\n' * 4, "got 4"),
        ("{]\n", "line 1: no JSON"),
        ("[1]\n", "line 1: an object required, got list"),
        ('{"prompt": "x"}\n\n{"text": "x"}\n', r"line 3: either .* the keys \['text'\]"),
        ('{"prompt": " "}\n', "line 1: either"),
        ('{"messages": []}\n', "line 1: either"),
        ('{"messages": [{"role": "user"}]}\n', "line 1: every message"),
    ],
)
def test_an_unusable_file_is_refused_with_the_number_of_the_line(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(PromptError, match=message):
        read_prompts(path)


def test_prompts_are_read_from_a_dataset(tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", *[{"prompt": f"p{i}"} for i in range(6)])
    assert read_prompts(tmp_path) == [f"p{i}" for i in range(6)]
    lines(tmp_path / "train.jsonl", *[{"text": f"p{i}"} for i in range(6)])
    with pytest.raises(PromptError, match="row 1: either a text"):
        read_prompts(tmp_path)
    with pytest.raises(PromptError, match="no file, and no dataset that can be read"):
        read_prompts(tmp_path / "missing")


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="cannot be read"):
        read_prompts(tmp_path / "missing.jsonl")
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PromptError, match="cannot be read"):
        read_prompts(tmp_path / "b")
