"""The picture of an evaluation: quality against bytes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_mediator.delta.curve import Point
from mergekit_mediator.errors import OutputError

_LEFT_OUT = {"experts", "best_static"}


def plot_quality(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw the systems of `results.to_json`: each one's mean, and a line down to its worst task.

    What only repeats another system, or is drawn at 100 by definition, is left out.

    Raises:
        OutputError: matplotlib is missing, no system has a mean, or the file cannot be written.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OutputError(
            "the picture needs matplotlib: pip install mergekit-mediator[plot]"
        ) from error
    figure = Figure(figsize=(8.0, 4.2), layout="constrained")
    axes = figure.subplots()
    shown = {
        name: (row["total_bytes_over_base"], row["normalized_mean"], row["normalized_worst"])
        for name, row in rows.items()
        if name not in _LEFT_OUT
        and row.get("normalized_mean") is not None
        and "total_bytes_over_base" in row
    }
    if not shown:
        raise OutputError(
            f"{path}: nothing to draw: an expert answers none of its prompts right, so none is 100"
        )
    colors = colormaps["tab20"]
    for index, (name, (size, mean, worst)) in enumerate(shown.items()):
        color, ours = colors(index % 20), name.startswith("mediator")
        axes.plot([size, size], [worst, mean], color=color, linewidth=1)
        axes.plot(size, worst, "_", color=color)
        marker, area = ("*", 11) if ours else ("o", 6)
        axes.plot(size, mean, marker, color=color, markersize=area, label=name)
    axes.set(xscale="log", xlabel="bytes of everything / bytes of one model")
    axes.set_ylabel("exact match, expert = 100\nmean, and down to the worst task")
    ticks = [
        t
        for t in (1, 1.1, 1.25, 1.5, 2, 4, 8, 16, 32)
        if t <= 1.3 * max(s for s, _, _ in shown.values())
    ]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error


def plot_conflict(
    path: Path, layers: Sequence[str], profile: Mapping[str, Sequence[float]], routed: Sequence[Any]
) -> None:
    """Draw the conflict profile: one line per metric over the layers, routed layers shaded.

    Raises:
        OutputError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OutputError("--plot needs matplotlib: pip install mergekit-mediator[plot]") from error
    figure = Figure(figsize=(max(6.0, 0.22 * len(layers)), 3.6), layout="constrained")
    axes = figure.subplots()
    for metric, values in profile.items():
        axes.plot(range(len(layers)), values, marker="o", markersize=3, label=metric)
    for index, chosen in enumerate(routed):
        if chosen:
            axes.axvspan(index - 0.5, index + 0.5, color="0.9", zorder=0)
    axes.set(xlabel="layer (routed layers shaded)", ylabel="conflict", ylim=(0, 1))
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error


def plot_curve(path: Path, points: Sequence[Point]) -> None:
    """Draw predicted quality against bytes.

    Raises:
        OutputError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OutputError("--plot needs matplotlib: pip install mergekit-mediator[plot]") from error
    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    axes = figure.subplots()
    sizes = [point.over_dense for point in points]
    axes.plot(sizes, [100 * p.loss_recovered for p in points], marker="o", label="loss recovered")
    axes.plot(sizes, [100 * (1 - p.left) for p in points], marker=".", label="squared change kept")
    axes.set(xlabel="everything together / one model", ylabel="%, predicted", xscale="log")
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes], fontsize=7)
    axes.minorticks_off()
    axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error
