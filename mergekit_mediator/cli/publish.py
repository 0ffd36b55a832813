"""Bring the card of an artifact and its pictures up to date."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import click

from mergekit_mediator.cli.canvas import has_matplotlib, to_png
from mergekit_mediator.cli.inspection import inspect_figures
from mergekit_mediator.cli.plots import evaluation_figure, layers_figure, router_figure
from mergekit_mediator.errors import OutputError
from mergekit_mediator.store.calibration import calibration_of
from mergekit_mediator.store.card import refresh_card
from mergekit_mediator.store.evaluation import Evaluation, read_evaluation
from mergekit_mediator.store.manifest import EVALUATION, PICTURES, Manifest, read_manifest
from mergekit_mediator.store.output_lock import output_lock


def refresh(root: Path) -> None:
    """Write the generated part of an artifact's card anew, with its pictures if matplotlib is there.

    Where the card cannot be written, it stays as it is, and a warning says why. A note tells of results of an
    evaluation that are left out, since the artifact has changed.

    Args:
        root: the artifact's directory.

    Raises:
        ArtifactError: the artifact or the record of its evaluation is damaged.
    """
    manifest = read_manifest(root)
    evaluation = read_evaluation(root, manifest)
    if evaluation is None and (root / EVALUATION).is_file():
        click.echo(
            f"note: {root / EVALUATION}: the artifact has changed since it was evaluated, so the results are "
            "left out: run `mergekit-mediator evaluate` again",
            err=True,
        )
    try:
        with output_lock(root):
            refresh_card(root, manifest, evaluation, partial(_draw, root, manifest, evaluation))
    except OutputError as error:
        click.echo(f"warning: the card stays as it is: {error}", err=True)


def _draw(root: Path, manifest: Manifest, evaluation: Evaluation | None) -> Mapping[str, bytes]:
    """Draw the pictures of a card by name; none without matplotlib."""
    if not has_matplotlib():
        click.echo(
            "note: the card has no pictures without matplotlib: pip install mergekit-mediator[plot]",
            err=True,
        )
        return {}
    layers, router, results = PICTURES
    figures = {layers: layers_figure(inspect_figures(root, manifest))}
    calibration = calibration_of(manifest)
    if calibration is not None:
        figures[router] = router_figure(calibration.model_dump())
    if evaluation is not None:
        figures[results] = evaluation_figure(evaluation.model_dump())
    return {name: to_png(figure) for name, figure in figures.items()}
