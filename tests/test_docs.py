"""README and docs are true: made from the results that are there, and every link and command exists."""

import json
import re
import runpy

import click
import fill_docs
import mergekit.scripts.run_yaml
import pytest
import quality
from documents import ROOT, anchors, commands, documents, links, name, prose, spans
from PIL import Image

from mergekit_mediator.cli.main import main

DOCUMENTS = documents()
RESULTS = sorted(path.stem for path in (ROOT / "benchmarks/results").glob("*.json"))
MAKEFILE = (ROOT / "Makefile").read_text()
# Tools of others that the documents name; their options are not ours to check.
OTHERS = {"pip", "pre-commit", "git", "curl", "vllm", "hf"}

every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=name)


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_bytes()) <= 7000


@pytest.mark.parametrize("path", fill_docs.pages(), ids=name)
def test_every_section_is_made_from_the_results_that_are_there(path):
    text = path.read_text(encoding="utf-8")
    assert fill_docs.filled(text) == text, "run `make docs`"


def test_every_section_stands_on_one_page():
    there = [n for path in fill_docs.pages() for n in fill_docs.names(path.read_text("utf-8"))]
    assert sorted(there) == sorted(fill_docs.SECTIONS)


def test_a_figure_that_was_changed_by_hand_is_noticed():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    changed = re.sub(r"\d\.\d \|", "9.9 |", text, count=1)
    assert changed != text
    assert fill_docs.filled(changed) == text


def test_a_section_that_nothing_makes_is_refused():
    with pytest.raises(KeyError, match="nothing"):
        fill_docs.filled("<!-- nothing -->\nx\n<!-- end nothing -->")


def test_every_results_file_has_a_page_that_says_how_it_was_made():
    told = {n.removeprefix("about ") for n in fill_docs.SECTIONS if n.startswith("about ")}
    assert told == set(RESULTS)


@pytest.mark.parametrize("record", RESULTS)
def test_how_a_result_was_made_is_told_in_full(record):
    figures = json.loads((ROOT / f"benchmarks/results/{record}.json").read_text())
    told = fill_docs.SECTIONS[f"about {record}"]()
    script = re.search(r"python (benchmarks/\w+\.py)", told)
    assert (ROOT / script[1]).is_file()
    for value in (*figures["versions"].values(), *map(str, figures["seeds"].values())):
        assert value in told


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs/results").glob("*.md")), ids=lambda path: path.name
)
def test_no_figure_of_a_results_page_is_typed_by_hand(path):
    typed = re.sub(r"`[^`]*`", "", fill_docs.typed(path.read_text(encoding="utf-8")))
    assert not re.findall(r"\d[\d.,]* ?%|\d+\.\d{2,}", typed)


@pytest.mark.parametrize("theme", quality.THEMES)
def test_the_picture_of_the_readme_shows_the_results_that_are_there(theme):
    with Image.open(ROOT / f"benchmarks/results/{theme}.png") as picture:
        assert picture.text["Source"] == quality.source(), "run `make docs`"


@every_document
def test_every_link_leads_somewhere(path):
    for target in links(path):
        file, _, anchor = target.partition("#")
        if file.startswith("https://"):
            continue
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        assert there.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(there), target


def test_every_page_is_in_the_table_of_contents():
    index = ROOT / "docs/index.md"
    listed = {(index.parent / target).resolve() for target in links(index)}
    assert {*(ROOT / "docs").rglob("*.md")} - {index} <= listed


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files that the documents name, as the commands check that they exist."""
    (tmp_path / "OUT").mkdir()
    (tmp_path / "config.yml").write_text("merge_method: mediator\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@every_document
def test_every_command_exists_with_its_options(path, folder):
    for words in commands(path):
        check_command(words)


@every_document
def test_every_command_in_the_text_exists_with_its_options(path):
    ours = main.list_commands(click.Context(main))
    for span in spans(path):
        words = span.removeprefix("mergekit-mediator ").split()
        if span.startswith("mergekit-mediator ") or (
            words[0] in ours and any(word.startswith("--") for word in words)
        ):
            known = options(words[0])
            assert {word.split("=")[0] for word in words if word.startswith("--")} <= known, span
        if words[0] in ("make", "python", ".venv/bin/python"):
            check_command(words)


@pytest.mark.parametrize(
    "words",
    [
        ["mergekit-mediator", "unknown", "OUT"],
        ["mergekit-mediator", "inspect", "OUT", "--unknown"],
        ["mergekit-mediator", "calibrate", "ELSEWHERE"],
        ["mergekit-yaml", "config.yml", "OUT", "--unknown"],
        ["make", "unknown"],
        ["python", "benchmarks/unknown.py"],
        ["python", "examples/route_a_prompt.py", "OUT", "--unknown"],
        ["unknown"],
    ],
    ids=" ".join,
)
def test_a_command_that_does_not_exist_is_noticed(words, folder):
    with pytest.raises((click.UsageError, AssertionError)):
        check_command(words)


def check_command(words):
    """Fails unless a command, its options and the files that it reads exist."""
    while re.match("[A-Z_]+=", words[0]):  # variables of the environment
        words = words[1:]
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "mergekit-mediator":
        subname, command, rest = main.resolve_command(click.Context(main), arguments)
        command.make_context(subname, rest)
    elif program == "mergekit-yaml":
        mergekit.scripts.run_yaml.main.make_context(program, arguments)
    elif program == "make":
        targets = re.findall(r"^([\w\- ]+):", MAKEFILE, re.MULTILINE)
        known = {target for line in targets for target in line.split()}
        assert {word for word in arguments if "=" not in word} <= known, words
    elif program == "python":
        check_python(arguments)
    else:
        assert program in OTHERS, words


def check_python(arguments):
    if arguments[0] == "-m":
        paths = [word for word in arguments[2:] if "/" in word and "*" not in word]
        assert all((ROOT / path).exists() for path in paths), arguments
        return
    script = ROOT / arguments[0]
    assert script.is_file(), arguments
    source = script.read_text(encoding="utf-8")
    for word in (word for word in arguments[1:] if word.startswith("--")):
        positive = word.replace("--no-", "--")  # of argparse.BooleanOptionalAction
        assert f'"{word}"' in source or f'"{positive}"' in source, (arguments, word)


def options(command):
    """The options of one of our commands."""
    found = main.get_command(click.Context(main), command)
    assert found is not None, command
    return {"--help", *(o for parameter in found.params for o in parameter.opts)}


def test_every_room_has_its_paragraph_and_its_arrows():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    allowed = runpy.run_path(str(ROOT / "tests/test_house.py"))["ALLOWED"]
    rooms = {path.parent.name for path in (ROOT / "mergekit_mediator").glob("*/__init__.py")}
    for room in rooms:
        assert f"\n**{room}** " in text
    drawn = {b: set(a.split(", ")) for a, b in re.findall(r"^([a-z_, ]+) <- (\w+)$", text, re.M)}
    assert drawn.pop("cli") == {"everything"}
    for room in rooms - {"cli"}:
        assert drawn.get(room, set()) == allowed[room] - {"errors"}, room


def test_what_the_fast_tests_leave_out_is_there():
    slow = re.search(r"^SLOW := (.*?[^\\])$", MAKEFILE, re.MULTILINE | re.DOTALL)[1]
    assert all((ROOT / "tests" / file).exists() for file in slow.replace("\\", "").split())


def test_the_two_commands_of_a_newcomer_stand_in_the_readme():
    assert "On a bare machine with Python 3.10 or newer" in prose(ROOT / "README.md")
    assert [words for words in commands(ROOT / "README.md") if words[0] == "make"] == [
        ["make", "demo"],
        ["make", "test"],
    ]
