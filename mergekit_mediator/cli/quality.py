"""Draw quality against bytes: every system of an evaluation, named at its point."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergekit_mediator.cli.canvas import GRID, OTHERS, OURS
from mergekit_mediator.cli.point_labels import Label, name_points
from mergekit_mediator.evaluate.results import BEST_STATIC, EXPERTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The picture leaves out the experts, which are 100 by definition, and a copy of another system.
_LEFT_OUT = {EXPERTS, BEST_STATIC}
# Fewer extra bytes than this fraction of a model are drawn as none: file headers differ by as much.
_NOTHING = 0.001
_TICKS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


@dataclass(frozen=True)
class System:
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


def draw_quality(figure: "Figure", axes: "Axes", systems: Sequence[System]) -> None:
    """Draw each system's mean, and a line down to its worst task; systems at the same point share a label.

    The horizontal axis shows the bytes beside one model. Other axes of the figure must be drawn before: the names
    are written where they cover nothing, and this fixes the layout of the figure.
    """
    places = extra_axis(axes, [system.extra for system in systems])
    for system, place in zip(systems, places, strict=True):
        color, marker = (OURS, "D") if system.ours else (OTHERS, "o")
        axes.plot([place, place], [system.worst, system.mean], color=color, linewidth=0.8)
        axes.plot(place, system.worst, "_", color=color)
        axes.plot(place, system.mean, marker, color=color, markersize=6)
    axes.set_ylabel("exact match, expert = 100\nmean, and down to the worst task")
    axes.set_ylim(-4, max(108.0, 1.08 * max(system.mean for system in systems)))
    axes.grid(axis="y", color=GRID, linewidth=0.8, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    labels = [
        Label(", ".join(s.names), place, s.mean, s.worst, OURS if s.ours else OTHERS)
        for s, place in zip(systems, places, strict=True)
    ]
    name_points(figure, axes, labels)


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


def systems_of(rows: Mapping[str, Mapping[str, Any]]) -> list[System]:
    """Collect the systems that have a place in the picture; systems at one point are one."""
    points: dict[tuple[float, ...], System] = {}
    for name, row in rows.items():
        mean, size = row.get("normalized_mean"), row.get("total_bytes_over_base")
        if name in _LEFT_OUT or mean is None or size is None:
            continue
        extra, worst = size - 1, row["normalized_worst"]
        step = round(20 * math.log10(extra)) if extra >= _NOTHING else -math.inf
        place = (step, round(mean), round(worst))
        others = points[place].names if place in points else ()
        points[place] = System((*others, name), extra, mean, worst)
    return list(points.values())
