"""Write the pictures of the commands: what an artifact holds, what an evaluation found, what budgets keep."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_mediator.cli.canvas import new_axes, new_figure, save
from mergekit_mediator.cli.panels import (
    conflict_profile,
    draw_bytes,
    draw_conflict,
    draw_confusion,
    draw_reliability,
    rows_height,
)
from mergekit_mediator.cli.quality import draw_quality, extra_axis, systems_of
from mergekit_mediator.errors import OutputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

    from mergekit_mediator.delta.curve import Point

_WIDTH = 8.0


def plot_quality(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw the systems of `results.to_json`: each one's mean, and a line down to its worst task.

    Raises:
        OutputError: matplotlib is missing, no system has a mean, or the file cannot be written.
    """
    figure, axes = new_axes("the picture", _WIDTH, 4.6)
    systems = systems_of(rows)
    if not systems:
        raise OutputError(
            f"{path}: there is nothing to draw: an expert answers none of its prompts right, so that "
            "no system has a mean"
        )
    draw_quality(figure, axes, systems)
    save(figure, path)


def plot_conflict(
    path: Path, layers: Sequence[str], profile: Mapping[str, Sequence[float]], routed: Sequence[Any]
) -> None:
    """Draw the conflict profile: one line per metric over the layers, routed layers shaded.

    Raises:
        OutputError: matplotlib is missing, or the file cannot be written.
    """
    figure, axes = new_axes("--plot", 6.0, rows_height(len(layers)))
    draw_conflict(axes, layers, profile, routed)
    save(figure, path)


def plot_curve(path: Path, points: Sequence["Point"]) -> None:
    """Draw predicted quality against bytes, and the change that is kept unless the error is noise.

    Args:
        path: the file, which ends with .png or .svg.
        points: the budgets.

    Raises:
        OutputError: matplotlib is missing, or the file cannot be written.
    """
    figure, axes = new_axes("--plot", 6.0, 3.6)
    sizes = extra_axis(axes, [point.over_dense - 1 for point in points])
    axes.plot(sizes, [100 * p.kept for p in points], marker="o", label="gain kept")
    if not any(point.is_noise for point in points):
        kept = [100 * (1 - p.left) for p in points]
        axes.plot(sizes, kept, marker=".", label="squared change kept")
    axes.set(ylabel="%, predicted", ylim=(0, 104))
    axes.legend(frameon=False)
    save(figure, path)


def plot_artifact(artifact: Mapping[str, Any], path: Path) -> None:
    """Draw conflict and bytes by layer, and below them the figures of a calibrated router.

    Args:
        artifact: the result of `inspect_figures`.
        path: the file, which ends with .png or .svg.

    Raises:
        OutputError: matplotlib is missing, or the file cannot be written.
    """
    layers, router = rows_height(len(artifact["layers"])), artifact["router"]
    if router is None:
        save(layers_figure(artifact), path)
        return
    figure = new_figure("--plot", _WIDTH, layers + 3.8)
    above, below = _halves(figure, layers, 3.8)
    _draw_layers(above, artifact)
    _draw_router(below, *router_panels(router))
    save(figure, path)


def plot_evaluation(evaluation: Mapping[str, Any], path: Path) -> None:
    """Draw quality against bytes, and where the router sent the prompts of each task, how surely.

    Args:
        evaluation: the figures of the command `evaluate`.
        path: the file, which ends with .png or .svg.

    Raises:
        OutputError: matplotlib is missing, or the file cannot be written.
    """
    save(evaluation_figure(evaluation), path)


def layers_figure(artifact: Mapping[str, Any]) -> "Figure":
    """Draw conflict and bytes by layer.

    Args:
        artifact: the result of `inspect_figures`.

    Raises:
        OutputError: matplotlib is missing.
    """
    figure = new_figure("--plot", _WIDTH, rows_height(len(artifact["layers"])))
    _draw_layers(figure, artifact)
    return figure


def router_figure(router: Mapping[str, Any]) -> "Figure":
    """Draw confusion and reliability of a calibrated router on held-out prompts.

    Args:
        router: the router's figures in the manifest.

    Raises:
        OutputError: matplotlib is missing.
    """
    figure = new_figure("--plot", _WIDTH, 3.8)
    _draw_router(figure, *router_panels(router))
    return figure


def evaluation_figure(evaluation: Mapping[str, Any]) -> "Figure":
    """Draw quality against bytes, confusion and reliability. Quality is left out if no system has a mean.

    Args:
        evaluation: the figures of the command `evaluate`.

    Raises:
        OutputError: matplotlib is missing.
    """
    systems = systems_of(evaluation["systems"])
    figure = new_figure("--plot", _WIDTH, 8.4 if systems else 3.8)
    if not systems:
        _draw_router(figure, *evaluation_panels(evaluation))
        return figure
    above, below = _halves(figure, 4.6, 3.8)
    _draw_router(below, *evaluation_panels(evaluation))
    draw_quality(figure, above.subplots(), systems)
    return figure


# The arguments of `draw_confusion`, and those of `draw_reliability`.
Panels = tuple[tuple[Sequence[str], Sequence[str], Sequence[Sequence[int]]], Sequence[Any]]


def router_panels(router: Mapping[str, Any]) -> Panels:
    """The confusion of a calibrated router and its reliability, which routers of version 0.1 lack."""
    names = router["experts"]
    return (names, names, router["confusion"]), router.get("reliability", ())


def evaluation_panels(evaluation: Mapping[str, Any]) -> Panels:
    """The confusion of the router on the tasks of an evaluation, and its reliability there."""
    routing = evaluation["routing"]
    tasks, experts = list(routing), list(next(iter(routing.values()))["chosen"])
    counts = [[routing[task]["chosen"][expert] for expert in experts] for task in tasks]
    return (tasks, experts, counts), evaluation["reliability"]


def bytes_by_expert(artifact: Mapping[str, Any]) -> dict[str, list[int]]:
    """The bytes that each expert stores of each layer, from the result of `inspect_figures`."""
    return {
        expert["name"]: [
            layer["stored"]["bytes"][expert["name"]] if layer["stored"] else 0
            for layer in artifact["layers"]
        ]
        for expert in artifact["experts"]
    }


def _halves(figure: "Figure", *heights: float) -> "tuple[SubFigure, SubFigure]":
    grid = figure.add_gridspec(2, 1, height_ratios=heights)
    return figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])


def _draw_layers(figure: "Figure | SubFigure", artifact: Mapping[str, Any]) -> None:
    layers = artifact["layers"]
    names = [layer["name"] for layer in layers]
    profile = conflict_profile(layers)
    if profile:
        left, right = figure.subplots(1, 2)
        draw_conflict(left, names, profile, [layer["routed"] for layer in layers])
    else:
        right = figure.subplots()
    draw_bytes(right, names, bytes_by_expert(artifact))


def _draw_router(
    figure: "Figure | SubFigure", confusion: tuple[Any, ...], reliability: Sequence[Any]
) -> None:
    if not reliability:
        draw_confusion(figure.subplots(), *confusion)
        return
    left, right = figure.subplots(1, 2)
    draw_confusion(left, *confusion)
    draw_reliability(right, reliability)
