import json
import subprocess
import sys
from pathlib import Path

import click.testing
import pytest

from mergekit_mediator.cli import demo
from mergekit_mediator.cli.main import main
from mergekit_mediator.cli.steps import Steps

RECORD = Path(__file__).parents[2] / "benchmarks/results/demo.json"
NOISY = """
import logging, subprocess, sys, warnings
from pathlib import Path
from mergekit_mediator.cli.steps import Steps

handler = logging.StreamHandler()  # it keeps the standard error of now
logging.getLogger("library").addHandler(handler)
log = None if sys.argv[1] == "-v" else Path(sys.argv[1])
steps = Steps(2, log)
for name in ("merge", "score"):
    with steps.step(name):
        print("loading weights: 100%", file=sys.stderr)
        warnings.warn("deprecated")
        logging.getLogger("library").warning("cannot load")
        subprocess.run([sys.executable, "-c", "import os; os.write(2, b'from a process')"])
"""


def noisy(argument):
    result = subprocess.run(
        [sys.executable, "-c", NOISY, str(argument)], capture_output=True, text=True, check=True
    )
    return result.stderr.splitlines()


def test_a_step_is_one_line_and_what_libraries_say_goes_to_the_log(tmp_path):
    assert noisy(tmp_path / "log.txt") == ["[1/2] merge 0 s", "[2/2] score 0 s"]
    log = (tmp_path / "log.txt").read_text()
    for text in ("loading weights: 100%", "deprecated", "cannot load", "from a process"):
        assert text in log


def test_verbose_shows_what_libraries_say():
    shown = "\n".join(noisy("-v"))
    for text in ("[1/2] merge", "loading weights: 100%", "deprecated", "cannot load"):
        assert text in shown


def test_a_step_that_fails_says_so_and_where_the_messages_are(tmp_path, capsys):
    steps = Steps(1, tmp_path / "log.txt")
    with pytest.raises(ValueError, match="invalid literal"), steps.step("merge"):
        int("broken")
    said = capsys.readouterr().err
    assert said.startswith("[1/1] merge failed (the messages of libraries are in ")
    print("shown again", file=sys.stderr)
    assert capsys.readouterr().err == "shown again\n"


def figures():
    """The figures of the recorded run, with an answer to a long prompt of each skill."""
    record = json.loads(RECORD.read_text())
    answers = {
        skill: {
            "prompt": "A long story, line by line.\n" * 9 + f"What is asked of {skill}?",
            "mixture": {skill: 1.0},
            "answer": " right",
            "expected": "right",
        }
        for skill in record["routing"]
    }
    return {**record, "answers": answers}


def test_the_summary_fits_one_screen_and_says_what_to_try_next():
    lines = demo.summary(figures(), Path("demo"), "mergekit-mediator").splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 80
    following = lines[lines.index(next(x for x in lines if x.endswith("Try next:"))) + 1 :]
    assert [line.split()[1] for line in following] == ["generate", "inspect", "plan"]


def test_a_wrong_answer_is_shown_beside_the_right_one():
    shown = figures()
    shown["answers"]["sums"]["answer"] = "41"
    assert "[sums] 41 (not right)" in demo.summary(shown, Path("demo"), "x")


def test_a_folder_that_is_in_use_is_refused_before_anything_is_done(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    result = click.testing.CliRunner().invoke(main, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 1
    message = "an empty directory is required, got one with files: choose another with --out"
    assert message in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
