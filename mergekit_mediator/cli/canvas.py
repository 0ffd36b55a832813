"""Make empty figures, and write them as PNG or SVG."""

import io
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_mediator.errors import OutputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, OTHERS = "#c2410c", "#475569"
GRID, SHADE, FAINT = "#ebebeb", "#e5e5e5", "#94a3b8"
# Colors of experts and metrics, which can be told apart on white and on black.
SERIES = ("#2f7ed8", "#e08a00", "#2f9e5b", "#d1497b", "#8464c6", "#00a0b0", "#a0713a", "#8a8f98")
_DPI = 120


def has_matplotlib() -> bool:
    """Tell whether figures can be drawn."""
    return find_spec("matplotlib") is not None


def new_figure(asker: str, width: float, height: float) -> "Figure":
    """Make an empty figure of a size in inches.

    Args:
        asker: the option or command that needs it, for the message.
        width: in inches.
        height: in inches.

    Raises:
        OutputError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OutputError(
            f"{asker} needs matplotlib: pip install mergekit-mediator[plot]"
        ) from error
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_axes(asker: str, width: float, height: float) -> tuple["Figure", "Axes"]:
    """Make a figure with one empty pair of axes; see `new_figure`."""
    figure = new_figure(asker, width, height)
    return figure, figure.subplots()


def save(figure: "Figure", path: Path) -> None:
    """Write a figure in the format that the suffix of a file names.

    Raises:
        OutputError: the file cannot be written, or the suffix names no format.
    """
    try:
        with _svg_settings():
            figure.savefig(path)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error


def to_png(figure: "Figure") -> bytes:
    """The content of the figure's PNG file."""
    return _content(figure, format="png")


def to_svg(figure: "Figure") -> str:
    """The content of the figure's SVG file, without a background and a date."""
    content = _content(figure, format="svg", transparent=True, metadata={"Date": None})
    return content.decode()


def _content(figure: "Figure", **options: Any) -> bytes:
    file = io.BytesIO()
    with _svg_settings():
        figure.savefig(file, **options)
    return file.getvalue()


def _svg_settings() -> AbstractContextManager[None]:
    """Text remains text in an SVG file, and equal figures give equal files."""
    from matplotlib import rc_context

    return rc_context({"svg.fonttype": "none", "svg.hashsalt": "mergekit-mediator"})
