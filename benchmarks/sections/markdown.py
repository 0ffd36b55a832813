"""Results and Markdown, as every section needs them."""

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


def load(name: str) -> dict[str, Any]:
    """The figures of results/NAME.json."""
    figures: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return figures


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def about(name: str) -> str:
    """How results/NAME.json was made: its command, versions, machine and seeds."""
    record = load(name)
    lines = [f"- File: `benchmarks/results/{name}.json`"]
    for part, made in record.get("also", {}).items():
        lines += [f"\nThe {part}:\n", *_made(made)]
    return "\n".join([*_made(record), *lines])


def _made(record: dict[str, Any]) -> list[str]:
    """The command, the versions, the machine and the seeds of a record, as a list."""
    machine = record["machine"]
    card = f", {machine['card']}" if "card" in machine else ""
    versions = ", ".join(f"{package} {v}" for package, v in record["versions"].items())
    seeds = ", ".join(f"{use} {seed}" for use, seed in record["seeds"].items()) or "none"
    return [
        f"- Command: `{script(record['command'])}`",
        f"- Versions: Python {record['python']}, {versions}",
        f"- Machine: {machine['processor']}, {machine['cores']} cores, {machine['system']}{card}",
        f"- Seeds: {seeds}",
    ]


def script(command: str) -> str:
    """A recorded command with the folder of its script: scripts are recorded by their file name."""
    return re.sub(r"^python (\w+\.py)", r"python benchmarks/\1", command)
