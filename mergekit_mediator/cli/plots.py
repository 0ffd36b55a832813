"""Draw the pictures of the commands: quality against bytes, conflict by layer, quality of budgets."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_mediator.cli.point_labels import Label, name_points
from mergekit_mediator.delta.curve import Point
from mergekit_mediator.errors import OutputError
from mergekit_mediator.evaluate.results import BEST_STATIC, EXPERTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The picture leaves out the experts, which are 100 by definition, and a copy of another system.
_LEFT_OUT = {EXPERTS, BEST_STATIC}
_OURS, _OTHERS = "#c2410c", "#475569"
# Fewer extra bytes than this fraction of a model are drawn as none: file headers differ by as much.
_NOTHING = 0.001
_DPI = 120
_TICKS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


@dataclass(frozen=True)
class _System:
    """One point of the picture.

    Attributes:
        names: the names of all systems at this point.
        extra: the bytes beside one model, as a fraction of one model.
        mean: the mean over tasks, in percent of the expert.
        worst: the worst task, in percent of the expert.
    """

    names: tuple[str, ...]
    extra: float
    mean: float
    worst: float

    @property
    def ours(self) -> bool:
        """Whether a system of this package is among the names."""
        return any(name.startswith("mediator") for name in self.names)


def plot_quality(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw the systems of `results.to_json`: each one's mean, and a line down to its worst task.

    The horizontal axis shows the bytes beside one model. Each system is named at its point, and
    systems at the same point share a label.

    Raises:
        OutputError: matplotlib is missing, no system has a mean, or the file cannot be written.
    """
    figure, axes = _figure("the picture", 8.0, 4.6)
    systems = _systems(rows)
    if not systems:
        raise OutputError(
            f"{path}: there is nothing to draw: an expert answers none of its prompts right, so that "
            "no system has a mean"
        )
    places = extra_axis(axes, [system.extra for system in systems])
    for system, place in zip(systems, places, strict=True):
        color, marker = (_OURS, "D") if system.ours else (_OTHERS, "o")
        axes.plot([place, place], [system.worst, system.mean], color=color, linewidth=0.8)
        axes.plot(place, system.worst, "_", color=color)
        axes.plot(place, system.mean, marker, color=color, markersize=6)
    axes.set_ylabel("exact match, expert = 100\nmean, and down to the worst task")
    axes.set_ylim(-4, max(108.0, 1.08 * max(system.mean for system in systems)))
    axes.grid(axis="y", color="0.92", linewidth=0.8, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    labels = [
        Label(", ".join(s.names), place, s.mean, s.worst, _OURS if s.ours else _OTHERS)
        for s, place in zip(systems, places, strict=True)
    ]
    name_points(figure, axes, labels)
    _save(figure, path)


def extra_axis(axes: "Axes", extras: Sequence[float]) -> list[float]:
    """Scale the horizontal axis for bytes beside one model.

    The axis is logarithmic. Its left edge is "none" if a system has no bytes beside one model.

    Args:
        axes: the axes to scale.
        extras: the bytes of each system beside one model, as fractions of one model.

    Returns:
        The place of each system on the axis.
    """
    positive = [extra for extra in extras if extra >= _NOTHING]
    least, most = min(positive, default=0.01), max(positive, default=1.0)
    edge = least / 5 if len(positive) < len(extras) else least
    ticks = [tick for tick in _TICKS if least / 1.8 <= tick <= most * 1.8]
    names = [f"+{100 * t:g}%" if t < 1 else f"+{t:g} model{'s' * (t > 1)}" for t in ticks]
    axes.set(xscale="log", xlim=(edge / 1.3, most * 3), xlabel="bytes beside one model")
    if edge < least:
        ticks, names = [edge, *ticks], ["none", *names]
    axes.set_xticks(ticks, names)
    axes.minorticks_off()
    return [extra if extra >= _NOTHING else edge for extra in extras]


def _systems(rows: Mapping[str, Mapping[str, Any]]) -> list[_System]:
    """Collect the systems that have a place in the picture; systems at one point are one."""
    points: dict[tuple[float, ...], _System] = {}
    for name, row in rows.items():
        mean, size = row.get("normalized_mean"), row.get("total_bytes_over_base")
        if name in _LEFT_OUT or mean is None or size is None:
            continue
        extra, worst = size - 1, row["normalized_worst"]
        step = round(20 * math.log10(extra)) if extra >= _NOTHING else -math.inf
        place = (step, round(mean), round(worst))
        others = points[place].names if place in points else ()
        points[place] = _System((*others, name), extra, mean, worst)
    return list(points.values())


def plot_conflict(
    path: Path, layers: Sequence[str], profile: Mapping[str, Sequence[float]], routed: Sequence[Any]
) -> None:
    """Draw the conflict profile: one line per metric over the layers, routed layers shaded.

    Raises:
        OutputError: matplotlib is missing, or the file cannot be written.
    """
    figure, axes = _figure("--plot", max(6.0, 0.22 * len(layers)), 3.6)
    for metric, values in profile.items():
        axes.plot(range(len(layers)), values, marker="o", markersize=3, label=metric)
    for index, is_routed in enumerate(routed):
        if is_routed:
            axes.axvspan(index - 0.5, index + 0.5, color="0.9", zorder=0)
    axes.set(xlabel="layer (routed layers shaded)", ylabel="conflict", ylim=(0, 1))
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    axes.legend(frameon=False)
    _save(figure, path)


def plot_curve(path: Path, points: Sequence[Point]) -> None:
    """Draw predicted quality against bytes.

    Raises:
        OutputError: matplotlib is missing, or the file cannot be written.
    """
    figure, axes = _figure("--plot", 6.0, 3.6)
    sizes = extra_axis(axes, [point.over_dense - 1 for point in points])
    axes.plot(sizes, [100 * p.loss_recovered for p in points], marker="o", label="loss recovered")
    axes.plot(sizes, [100 * (1 - p.left) for p in points], marker=".", label="squared change kept")
    axes.set(ylabel="%, predicted", ylim=(0, 104))
    axes.legend(frameon=False)
    _save(figure, path)


def _figure(asker: str, width: float, height: float) -> tuple["Figure", "Axes"]:
    """Make an empty picture of a size in inches; the error names the asker if matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OutputError(
            f"{asker} needs matplotlib: pip install mergekit-mediator[plot]"
        ) from error
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _save(figure: "Figure", path: Path) -> None:
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error
