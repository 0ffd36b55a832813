"""Interrupts, kills and failing disks: how often each was tried, and how often nothing was lost.

    python benchmarks/faults.py [--shots 3000] [--stride 1] [--random 60] [--meetings 100] [--again]

Requests are interrupted at random moments; merges and calibrations are killed or fail at each of their
steps, and meet each other. Helpers of the tests do it, on pico models: see attack_interrupts.py and
attack_publishing.py there for what counts as survived. Rows that are there already are kept unless
--again is given.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import record

HELPERS = Path(__file__).parents[1] / "tests" / "helpers"
SEED = 0
# By form of `attack_interrupts`, what is interrupted.
INTERRUPTED = {
    "mixture": "a mixture entered and left, one thread",
    "threads": "a mixture entered and left, two threads",
    "merge": "a forward pass with the mixture merged in",
    "rows": "a forward pass with a mixture for each row",
    "routed": "a routed `generate`",
    "wide": "a mixture of 4.9M routed weights entered and left, two threads",
}


def interrupts(form: str, shots: int) -> dict[str, Any]:
    """One row: interrupts of one form of request."""
    sys.path.insert(0, str(HELPERS))
    import attack_interrupts

    lost = attack_interrupts.attack(form, shots, SEED).total()
    return {"name": f"interrupt: {INTERRUPTED[form]}", "tried": shots, "survived": shots - lost}


def publishing(stride: int, random: int, meetings: int) -> list[dict[str, Any]]:
    """The rows of merges and calibrations that are stopped, or meet."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        options = ["--seed", SEED, "--stride", stride, "--random", random, "--meetings", meetings]
        options += ["--json", file]
        command = [sys.executable, HELPERS / "attack_publishing.py", *options]
        subprocess.run(list(map(str, command)), check=False)  # it fails where something is lost
        rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shots", type=int, default=3000, help="interrupts of each form")
    parser.add_argument("--stride", type=int, default=1, help="of the steps where merges stop")
    parser.add_argument(
        "--random", type=int, default=60, help="kills at random times, of each kind"
    )
    parser.add_argument("--meetings", type=int, default=100, help="of two processes, of each kind")
    parser.add_argument("--again", action="store_true", help="try everything again")
    options = parser.parse_args()
    rows = record.read("faults")["rows"] if record.exists("faults") and not options.again else []

    def keep(new: list[dict[str, Any]]) -> None:
        rows.extend(new)
        record.write("faults", {"rows": rows}, {"attacks": SEED})
        for row in new:
            print(f"{row['name']}: tried {row['tried']}, survived {row['survived']}", flush=True)

    if all(row["name"].startswith("interrupt") for row in rows):
        keep(publishing(options.stride, options.random, options.meetings))
    for form in INTERRUPTED:
        if not any(row["name"].endswith(INTERRUPTED[form]) for row in rows):
            keep([interrupts(form, options.shots)])


if __name__ == "__main__":
    main()
