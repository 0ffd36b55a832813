"""The picture of results/codec.json: accuracy against bytes per expert, ours and the rival's.

python benchmarks/codec_plot.py
"""

from __future__ import annotations

import json
from typing import Any

import record
from matplotlib.figure import Figure

KINDS = {"bits": "bits (low rank plus sparse)", "extract-lora": "extract-lora, ranks"}


def main() -> None:
    rows: list[dict[str, Any]] = json.loads((record.RESULTS / "codec.json").read_text())["rows"]
    families = list(dict.fromkeys(row["family"] for row in rows))
    figure = Figure(figsize=(4.2 * len(families), 3.4), layout="constrained")
    for axes, family in zip(
        figure.subplots(1, len(families), squeeze=False)[0], families, strict=True
    ):
        own = [row for row in rows if row["family"] == family]
        for kind, label in KINDS.items():
            line = sorted(
                (r["bytes_per_expert"] / 1e6, 100 * r["accuracy_over_expert"])
                for r in own
                if r["codec"].startswith(kind)
            )
            axes.plot(*zip(*line, strict=True), marker="o", markersize=4, label=label)
        for row in own:
            if not row["codec"].startswith(tuple(KINDS)):
                point = (row["bytes_per_expert"] / 1e6, 100 * row["accuracy_over_expert"])
                axes.plot(*point, marker="x", color="0.3")
                axes.annotate(row["codec"], point, fontsize=7, ha="right", va="top")
        axes.axhline(100, color="0.8", linewidth=0.8, zorder=0)
        axes.set(title=family, xscale="log", xlabel="MB per expert", ylabel="accuracy / expert, %")
        axes.legend(frameon=False, fontsize=7, loc="lower right")
    figure.savefig(record.RESULTS / "codec.png", dpi=110)


if __name__ == "__main__":
    main()
