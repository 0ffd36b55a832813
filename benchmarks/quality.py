"""The picture of the README: quality against bytes, of the five systems that matter.

    python benchmarks/quality.py

It is drawn from results/experts-4.json, once for light pages and once for dark ones.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import record
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mergekit_mediator.cli.quality import extra_axis

RESULTS = "experts-4"
# system -> its name, and where the label stands: its offset from the point in points, and its anchor
LABELS = {
    "base": ("base model", (13, 9), "left", "center"),
    "best_static": ("best of mergekit's own merges ({method})", (13, 0), "left", "center"),
    "extract_lora 4": ("extracted LoRA, rank 4", (13, -8), "left", "center"),
    "extract_lora 16": ("extracted LoRA, rank 16", (13, -7), "left", "center"),
    "mediator": ("mergekit-mediator", (-14, -4), "right", "center"),
    "experts": ("all {count} experts", (0, -12), "center", "top"),
}


@dataclass(frozen=True)
class Colors:
    """The colors of one picture."""

    page: str
    text: str
    others: str
    ours: str
    grid: str


THEMES = {
    "quality": Colors("#ffffff", "#1f2328", "#59636e", "#bc4c00", "#e5e9ed"),
    "quality-dark": Colors("#0d1117", "#f0f6fc", "#9198a1", "#f0883e", "#262c34"),
}


def main() -> None:
    results = record.read(RESULTS)
    for name, colors in THEMES.items():
        path = record.RESULTS / f"{name}.png"
        draw(results["systems"], colors).savefig(path, facecolor=colors.page)
        about = PngInfo()
        about.add_text("Source", source())
        with Image.open(path) as picture:  # a quarter of the bytes, and nobody sees it
            picture.quantize(64).save(path, optimize=True, pnginfo=about)


def source() -> str:
    """The digest of the results that the pictures show; each picture holds it as its source."""
    return hashlib.sha256((record.RESULTS / f"{RESULTS}.json").read_bytes()).hexdigest()


def draw(systems: dict[str, Any], colors: Colors) -> Figure:
    """The picture in the colors of one theme."""
    figure = Figure(figsize=(8.6, 4.6), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_facecolor(colors.page)
    shown = {name: systems[name] for name in LABELS}
    places = extra_axis(axes, [row["total_bytes_over_base"] - 1 for row in shown.values()])
    for place, (name, row) in zip(places, shown.items(), strict=True):
        color = colors.ours if name == "mediator" else colors.others
        mean, worst = row["normalized_mean"], row["normalized_worst"]
        axes.plot([place, place], [worst, mean], color=color, linewidth=1.2)
        axes.plot(place, worst, "_", color=color, markersize=8)
        marker, size = ("D", 10) if name == "mediator" else ("o", 8)
        axes.plot(place, mean, marker, color=color, markersize=size)
        label, offset, left, level = LABELS[name]
        method = row.get("coefficients", "").split(" ")[0]
        label = label.format(method=method, count=round(row["total_bytes_over_base"]))
        share = percent(mean) if mean == worst else f"{percent(mean)}, worst task {percent(worst)}"
        axes.annotate(
            f"{label}\n{share}",
            (place, mean),
            offset,
            textcoords="offset points",
            color=color if name == "mediator" else colors.text,
            fontsize=11.5,
            fontweight="bold" if name == "mediator" else "normal",
            ha=left,
            va=level,
            bbox={"facecolor": colors.page, "edgecolor": "none", "pad": 0.5},
        )
    axes.set_ylim(-5, 108)
    axes.set_yticks(range(0, 101, 20), [f"{tick}%" for tick in range(0, 101, 20)])
    axes.set_ylabel("kept of the experts' accuracy", color=colors.text, fontsize=11.5)
    axes.set_xlabel(
        "bytes beside one model, for four experts (log scale)", color=colors.text, fontsize=11.5
    )
    axes.tick_params(colors=colors.text, labelsize=11, length=0)
    axes.grid(axis="y", color=colors.grid, linewidth=1)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colors.others)
    return figure


def percent(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0") + "%"


if __name__ == "__main__":
    main()
