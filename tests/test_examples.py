"""The examples run as they stand, on pico models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = json.loads((EXAMPLES / "conflict_budget_answer.ipynb").read_text(encoding="utf-8"))


@pytest.fixture
def artifact(family, merged, tmp_path):
    """A merged family, with its configuration beside it."""
    config = family.config(route="all", density=0.3)
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    return merged(config)


def run(*arguments, **variables):
    """Run Python in a process of its own, with the commands of this environment on its path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PATH": path, "MPLBACKEND": "Agg", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_script_prints_the_decision_and_the_answer(artifact):
    script = str(EXAMPLES / "route_a_prompt.py")
    lines = run(script, str(artifact), "w1 w2", "w3", "--max-new-tokens", "4").splitlines()
    assert [line for line in lines if line.startswith("prompt:")] == [
        "prompt:   w1 w2",
        "prompt:   w3",
    ]
    decision = next(line for line in lines if line.startswith("decision:"))
    assert {"math", "code", "chat"} <= set(decision.split())
    assert any(line.startswith("answer:   ") and len(line) > 10 for line in lines)


def test_the_script_takes_an_expert_instead_of_routing(artifact):
    script = str(EXAMPLES / "route_a_prompt.py")
    output = run(script, str(artifact), "w1 w2", "--expert", "math", "--max-new-tokens", "4")
    assert "decision:" not in output
    assert "answer:   " in output


def test_the_notebook_runs_from_its_first_cell_to_its_last(artifact, tmp_path):
    cells = ["".join(c["source"]) for c in NOTEBOOK["cells"] if c["cell_type"] == "code"]
    output = run(
        "-c",
        "\n\n".join(cells),
        MEDIATOR_FOLDER=str(tmp_path),
        MEDIATOR_CONFIG="config.yml",
        MEDIATOR_ARTIFACT=str(artifact),
        MEDIATOR_PROMPT="w1 w2 w3",
    )
    assert [line.split()[0] for line in output.splitlines()[:4]] == [
        *("math", "code", "chat"),
        "entropy",
    ]


def test_the_notebook_is_kept_without_outputs():
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert code
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
