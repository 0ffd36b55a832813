"""Write names beside the points of a picture, so that it needs no legend."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

_FAINT = "#94a3b8"
# Pixels: the half width of a marker with its margin, and the distance from which a line leads to the point.
_MARKER, _FAR = 8.0, 14.0


@dataclass(frozen=True)
class Label:
    """A name for a point, in the coordinates of the data.

    Attributes:
        text: the name.
        x: the horizontal place of the point.
        y: the height of the point.
        foot: the height where the vertical line of the point ends.
        color: the color of the text.
    """

    text: str
    x: float
    y: float
    foot: float
    color: str


def name_points(figure: "Figure", axes: "Axes", labels: Sequence[Label]) -> None:
    """Write each label in the nearest free place; a thin line joins a distant label to its point.

    The scale of the axes must be set before. This call fixes the layout of the figure.

    Args:
        figure: the figure; it has an Agg canvas.
        axes: the axes of the figure.
        labels: the labels of points that are drawn already.
    """
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # a layout engine would move the measured places again
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    to_pixels, to_data = axes.transData.transform, axes.transData.inverted().transform
    obstacles = _Obstacles(axes.get_window_extent(renderer), [], [], [])
    for label in labels:
        (x, top), (_, bottom) = to_pixels([(label.x, label.y), (label.x, label.foot)])
        obstacles.marks.append(Bbox([(x - _MARKER, top - _MARKER), (x + _MARKER, top + _MARKER)]))
        obstacles.lines.append(Bbox([(x - 1, min(top, bottom)), (x + 1, max(top, bottom))]))
    for label in sorted(labels, key=lambda label: -label.y):
        text = axes.text(label.x, label.y, label.text, fontsize=7.5, color=label.color, va="center")
        x, y = to_pixels((label.x, label.y))
        box = obstacles.free_place(x, y, text.get_window_extent(renderer))
        obstacles.labels.append(box)
        text.set_position(tuple(to_data((box.x0, (box.y0 + box.y1) / 2))))
        nearest = min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)
        if math.dist((x, y), nearest) > _FAR:
            ends = to_data([(x, y), nearest])
            axes.plot(ends[:, 0], ends[:, 1], color=_FAINT, linewidth=0.6, zorder=1)


@dataclass(frozen=True)
class _Obstacles:
    """The areas, in pixels, that a label should not cover."""

    frame: "Bbox"
    labels: list["Bbox"]
    marks: list["Bbox"]
    lines: list["Bbox"]

    def free_place(self, x: float, y: float, size: "Bbox") -> "Bbox":
        """Find the place around a point where a label covers least and stands nearest."""
        from matplotlib.transforms import Bbox

        width, height = size.width, 1.05 * size.height
        margin = _MARKER + 4
        places = [
            Bbox.from_bounds(x + shift, y + rise * height / 2 - height / 2, width, height)
            for rise in sorted(range(-30, 31), key=abs)
            for shift in (margin, -margin - width, -width / 2)
        ]
        return min(places, key=lambda box: self._cost(box, x, y))

    def _cost(self, box: "Bbox", x: float, y: float) -> float:
        outside = (
            *(box.x0 < self.frame.x0, box.x1 > self.frame.x1),
            *(box.y0 < self.frame.y0, box.y1 > self.frame.y1),
        )
        cost: float = (
            1000 * any(outside)
            + 400 * sum(box.overlaps(other) for other in self.labels)
            + 200 * sum(box.overlaps(other) for other in self.marks)
            + 25 * sum(box.overlaps(other) for other in self.lines)
            + abs((box.y0 + box.y1) / 2 - y)
            + 5 * (box.x0 < x)  # readers look for a name at the right of its point first
        )
        return cost
