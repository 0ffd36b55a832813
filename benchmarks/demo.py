"""The demo as a user runs it, with its figures kept.

python benchmarks/demo.py [--prompts 32]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", default="32")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        command = [str(Path(sys.executable).with_name("mergekit-mediator")), "demo", "--json"]
        command += ["--out", f"{scratch}/demo", "--prompts", arguments.prompts]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, Any] = json.loads(output)
    sizes = figures["sizes"]
    kept = {
        "prompts_per_skill": int(arguments.prompts),
        "seconds": figures["seconds"],
        "systems": figures["systems"],
        "routing": figures["routing"],
        "sizes": {
            **{key: sizes[key] for key in ("dense_bytes", "total_bytes", "total_over_dense")},
            "experts": [{key: e[key] for key in ("name", "bytes")} for e in sizes["experts"]],
        },
    }
    print(record.write("demo", kept, {"report": 7}))


if __name__ == "__main__":
    main()
