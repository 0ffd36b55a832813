"""Draw the figures of a report, each alone, as SVG that stands in an HTML page and follows its colors."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from mergekit_mediator.cli.canvas import FAINT, GRID, OTHERS, OURS, SHADE, new_axes, to_svg
from mergekit_mediator.cli.panels import (
    conflict_profile,
    draw_bytes,
    draw_conflict,
    draw_confusion,
    draw_reliability,
    rows_height,
)
from mergekit_mediator.cli.plots import Panels, bytes_by_expert
from mergekit_mediator.cli.quality import draw_quality, systems_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The width in inches of a figure that can be read on a phone, and that of the one with many names.
_NARROW, _WIDE = 4.6, 7.4
# The page's names of the colors.
_COLORS = {
    "#000000": "text",
    OURS: "ours",
    OTHERS: "others",
    GRID: "grid",
    SHADE: "shade",
    FAINT: "faint",
}


def layer_figures(artifact: Mapping[str, Any]) -> str:
    """Draw conflict and bytes by layer, from the result of `inspect_figures`, as HTML."""
    layers = artifact["layers"]
    names = [layer["name"] for layer in layers]
    height = rows_height(len(layers))
    figures = []
    if profile := conflict_profile(layers):
        figure, axes = new_axes("report", _NARROW, height)
        draw_conflict(axes, names, profile, [layer["routed"] for layer in layers])
        figures.append(_html(figure, "conflict", "How much the experts' changes conflict"))
    figure, axes = new_axes("report", _NARROW, height)
    draw_bytes(axes, names, bytes_by_expert(artifact))
    figures.append(_html(figure, "bytes", "What each expert stores of each layer"))
    return _side_by_side(figures)


def router_figures(panels: Panels, name: str) -> str:
    """Draw confusion and reliability of a router as HTML.

    Args:
        panels: see `plots.router_panels`.
        name: a word that sets the figures apart from other figures of the page.
    """
    confusion, bins = panels
    figure, axes = new_axes("report", _NARROW, 4.2)
    draw_confusion(axes, *confusion)
    figures = [_html(figure, f"{name}-confusion", "Where prompts were sent")]
    if bins:
        figure, axes = new_axes("report", _NARROW, 4.2)
        draw_reliability(axes, bins)
        figures.append(_html(figure, f"{name}-reliability", "How far confidence can be trusted"))
    return _side_by_side(figures)


def quality_figure(systems: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw quality against bytes as HTML; empty if no system has a mean."""
    points = systems_of(systems)
    if not points:
        return ""
    figure, axes = new_axes("report", _WIDE, 4.4)
    draw_quality(figure, axes, points)
    return f'<div class="scroll" tabindex="0">{_html(figure, "quality", "Quality against bytes", "wide")}</div>'


def _side_by_side(figures: Sequence[str]) -> str:
    return f'<div class="figures">{"".join(figures)}</div>'


def _html(figure: "Figure", name: str, caption: str, kind: str = "narrow") -> str:
    """Write a figure with its caption; names inside the SVG get a prefix, and its colors follow the page's."""
    svg = to_svg(figure)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    for color, variable in _COLORS.items():
        svg = svg.replace(color, f"var(--{variable})")
    label = f'role="img" aria-label="{escape(caption)}"'
    svg = re.sub(r'width="([\d.]+)pt" height="[\d.]+pt"', label, svg, count=1)
    return f'<figure class="{kind}">{svg}<figcaption>{escape(caption)}</figcaption></figure>'
