"""Draw one figure of an artifact into a pair of axes: conflict, bytes, confusion or reliability."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergekit_mediator.cli.canvas import GRID, OTHERS, OURS, SERIES, SHADE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Names beside the axes shrink with their number, down to this size in points.
_SMALLEST, _LARGEST = 5.0, 8.0
# The characters of a legend's line.
_LINE = 46


def draw_conflict(
    axes: "Axes",
    layers: Sequence[str],
    profile: Mapping[str, Sequence[float]],
    routed: Sequence[bool | None],
) -> None:
    """Draw the conflict of each layer, from the first layer at the top: one line per metric, routed layers shaded.

    Args:
        axes: the axes.
        layers: the names of the layers.
        profile: by metric, the conflict of each layer, from 0 to 1.
        routed: for each layer whether it is routed; None counts as averaged.
    """
    rows = range(len(layers))
    for (metric, values), color in zip(profile.items(), _colors(len(profile)), strict=True):
        axes.plot(values, rows, marker="o", markersize=3, linewidth=1.2, label=metric, color=color)
    for index, is_routed in enumerate(routed):
        if is_routed:
            axes.axhspan(index - 0.5, index + 0.5, color=SHADE, linewidth=0, zorder=0)
    _layer_axis(axes, layers)
    shaded = " (routed layers shaded)" if any(routed) else ""
    axes.set(xlabel=f"conflict{shaded}", xlim=(0, 1))
    _legend(axes, list(profile))


def draw_bytes(axes: "Axes", layers: Sequence[str], sizes: Mapping[str, Sequence[int]]) -> None:
    """Draw the stored bytes of each layer, from the first layer at the top: one bar, divided among the experts.

    The experts beyond the seven largest share a color.

    Args:
        axes: the axes.
        layers: the names of the layers.
        sizes: by expert, the bytes of each layer.
    """
    shown = _largest(sizes)
    left = [0.0] * len(layers)
    unit, scale = _unit(max(map(sum, zip(*sizes.values(), strict=True)), default=0))
    for (name, values), color in zip(shown.items(), _colors(len(shown)), strict=True):
        widths = [value / scale for value in values]
        axes.barh(range(len(layers)), widths, 0.78, left, color=color, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    _layer_axis(axes, layers)
    axes.set(xlabel=f"stored, {unit}")
    axes.set_xlim(left=0)
    _legend(axes, list(shown))


def draw_confusion(
    axes: "Axes", rows: Sequence[str], columns: Sequence[str], counts: Sequence[Sequence[int]]
) -> None:
    """Draw which expert the prompts of each row were routed to: shares of the row, in percent.

    Args:
        axes: the axes.
        rows: the names of the true experts.
        columns: the names of the chosen experts.
        counts: by row and column, the number of prompts.
    """
    from matplotlib.patches import Rectangle

    size = _font(max(len(rows), len(columns)))
    for y, row in enumerate(counts):
        for x, count in enumerate(row):
            share = count / max(sum(row), 1)
            color = OTHERS if columns[x] == rows[y] else OURS
            cell = Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, alpha=0.65 * share)
            axes.add_patch(cell)
            if share >= 0.005:
                axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=size)
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=size)
    axes.set_yticks(range(len(rows)), rows, fontsize=size)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.set(xlabel="routed to, %", ylabel="prompts of", aspect="equal")
    axes.tick_params(length=0)


def draw_reliability(axes: "Axes", bins: Sequence[Sequence[float]]) -> None:
    """Draw accuracy against confidence: a circle per bin, larger with more prompts; a perfect router is on the line.

    Args:
        axes: the axes.
        bins: of each bin, the number of prompts, their mean confidence and their accuracy.
    """
    most = max(count for count, _, _ in bins)
    axes.plot([0, 1], [0, 1], color=OTHERS, linewidth=0.8, linestyle=":")
    for count, confidence, accuracy in bins:
        area = 20 + 180 * count / most
        axes.scatter([confidence], [accuracy], s=area, color=OURS, alpha=0.7, clip_on=False)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", aspect="equal")
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def rows_height(count: int) -> float:
    """The height in inches of a figure with so many layers."""
    return 1.1 + 0.15 * max(count, 8)


def conflict_profile(layers: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Collect the conflict of layers by metric; empty if no merge step measured it."""
    metrics = layers[0]["conflict"] if layers else {}
    return {m: [layer["conflict"].get(m, 0.0) for layer in layers] for m in metrics}


def _layer_axis(axes: "Axes", layers: Sequence[str]) -> None:
    axes.set_yticks(range(len(layers)), layers, fontsize=7)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: "Axes", names: Sequence[str]) -> None:
    """Write the legend above the axes, where it covers nothing, in as many columns as long names allow."""
    if names:
        columns = max(1, min(4, _LINE // max(map(len, names))))
        axes.legend(
            frameon=False, fontsize=7.5, ncols=columns, loc="lower left",
            bbox_to_anchor=(-0.02, 1.0), borderaxespad=0.2, handlelength=1.2, columnspacing=1.2,
        )  # fmt: skip


def _largest(sizes: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """Sum up the experts beyond the seven largest, if there are more than eight."""
    if len(sizes) <= len(SERIES):
        return dict(sizes)
    by_size = sorted(sizes, key=lambda name: -sum(sizes[name]))[: len(SERIES) - 1]
    shown = {name: values for name, values in sizes.items() if name in by_size}
    rest = [values for name, values in sizes.items() if name not in by_size]
    return {**shown, f"{len(rest)} others": [sum(column) for column in zip(*rest, strict=True)]}


def _colors(count: int) -> list[str]:
    return [SERIES[i % len(SERIES)] for i in range(count)]


def _unit(most: float) -> tuple[str, int]:
    """The unit of bytes, in powers of 1000, in which the largest size is one to a thousand."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if most >= scale:
            return unit, scale
    return "bytes", 1


def _font(count: int) -> float:
    return min(_LARGEST, max(_SMALLEST, 80 / max(count, 1)))
