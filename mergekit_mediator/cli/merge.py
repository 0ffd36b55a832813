"""The commands `merge` and `plan`, which need mergekit."""

import json
from collections.abc import Sequence
from pathlib import Path

import click
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions, add_merge_options
from pydantic import ValidationError

from mergekit_mediator.cli import options, plan_tables
from mergekit_mediator.cli.plots import plot_conflict, plot_curve
from mergekit_mediator.delta.curve import KeptPoint, Point
from mergekit_mediator.errors import ConfigError, first_line
from mergekit_mediator.merge import plugin
from mergekit_mediator.merge.conflict import METRICS
from mergekit_mediator.merge.estimate import estimate
from mergekit_mediator.merge.experts.budget import predict
from mergekit_mediator.merge.inputs import HeaderInputs
from mergekit_mediator.merge.loaders import OpenInputs
from mergekit_mediator.merge.low_rank_methods import ARTIFACTS, as_mediator
from mergekit_mediator.merge.measured import Measured
from mergekit_mediator.merge.passes import Passes
from mergekit_mediator.merge.preparation import prepared
from mergekit_mediator.merge.prompted.plan import PROMPTED, plan_prompted
from mergekit_mediator.merge.run import run
from mergekit_mediator.merge.workers import workers

_config = click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))


@click.command()
@_config
@click.argument("out")
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace the model in OUT, if there is one; other files in OUT stay.",
)
@click.option("--allow-nonfinite", is_flag=True, help="Accept NaN and infinity in the inputs.")
@add_merge_options  # type: ignore[untyped-decorator]
def merge(
    merge_options: MergeOptions, config: Path, out: str, overwrite: bool, allow_nonfinite: bool
) -> None:
    """Merge the models of CONFIG into an artifact in OUT, as `mergekit-yaml CONFIG OUT` does.

    Example: mergekit-mediator merge config.yml OUT --device cuda
    """
    _also_here(merge_options)
    merge_options.apply_global_options()
    source, merge_config = _read(config, ARTIFACTS)
    manifest = run(
        merge_config,
        out,
        merge_options,
        source,
        overwrite=overwrite,
        allow_nonfinite=allow_nonfinite,
    )
    routed = len(manifest.routed_layers)
    click.echo(
        f"{out}: dense expert and {len(manifest.experts)} sparse experts, "
        f"{routed} of {len(manifest.layers)} layers routed"
    )


@click.command()
@_config
@click.option("--conflict", is_flag=True, help="Measure conflict; this reads every weight once.")
@click.option(
    "--curve",
    is_flag=True,
    help="Predict bytes and quality for every `keep` and budget; this reads every weight once.",
)
@options.plot("the conflict or the curve")
@options.as_json
@add_merge_options  # type: ignore[untyped-decorator]
def plan(
    merge_options: MergeOptions,
    config: Path,
    conflict: bool,
    curve: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Show what the merge of CONFIG will read, write and need; reads headers only.

    Example: mergekit-mediator plan config.yml --curve --plot quality.png
    """
    _also_here(merge_options)
    if plot is not None and conflict == curve:
        raise click.UsageError("--plot needs exactly one of --conflict and --curve: give one")
    source, merge_config = _read(config, (*ARTIFACTS, *PROMPTED))
    if merge_config.merge_method in PROMPTED:
        if conflict or curve:
            raise click.UsageError(
                f"--conflict and --curve are of artifacts, and {merge_config.merge_method} writes none"
            )
        needs = plan_prompted(merge_config, merge_options, source)
        click.echo(
            json.dumps(vars(needs), indent=1) if as_json else plan_tables.prompted_report(needs)
        )
        return
    kind = OpenInputs if conflict or curve else HeaderInputs
    with prepared(kind, merge_config, merge_options, source) as preparation:
        inputs, weights = preparation.inputs, preparation.weights
        if curve and inputs.config.reference_is_merged:
            raise click.UsageError(
                "--curve predicts experts relative to the base, and with `reference: "
                f"{inputs.config.reference}` they are relative to a merge that is not there yet"
            )
        measured: dict[str, Measured] = {}
        points: list[Point] = []
        kept: list[KeptPoint] = []
        if isinstance(inputs, OpenInputs):
            costed = {weight.info.name for weight in weights} if curve else set()
            with workers() as threads:
                passes = Passes(inputs, threads)
                measured = {w.info.name: m for w, m in passes.measure(weights, costed)}
            if curve:
                points, kept = predict(inputs, weights, measured)
        plans = preparation.plan_layers({name: m.conflict for name, m in measured.items()})
        estimated = estimate(inputs, weights, plans)
    if plot is not None and curve:
        plot_curve(plot, points)
    elif plot is not None:
        profile: dict[str, list[float]] = {
            metric: [p.metrics.get(metric, 0.0) for p in plans] for metric in METRICS
        }
        plot_conflict(plot, [p.name for p in plans], profile, [p.routed for p in plans])
    figures = plan_tables.plan_figures(estimated) | (
        {"curve": [vars(p) for p in points], "keep": [vars(p) for p in kept]} if curve else {}
    )
    text = plan_tables.plan_report(estimated)
    if curve:
        text += f"\n\n{plan_tables.kept_report(kept)}\n\n{plan_tables.curve_report(points)}"
    elif inputs.config.keep is not None:
        text += f"\nHow many bytes keep {inputs.config.keep:g} depends on the weights: --curve predicts it."
    elif inputs.config.stores_signs:
        text += (
            "\nThe smaller `density` is, the more noise comes with each expert. An adapter that is exported for an engine "
            "holds it, too."
        )
    elif inputs.config.density_decides:
        text += "\nA budget keeps more in as many bytes, but not bit for bit: --curve predicts how much."
    reference = inputs.config.reference
    if inputs.config.reference_is_merged:
        text += (
            f"\nThe dense expert is merged by {reference} first, which reads all models more often, and lies on disk "
            "twice until the merge ends."
        )
    if reference != "base":
        text += (
            "\nEngines serve experts as adapters: with `reference: base` each needs its own rank alone, and with "
            f"`{reference}` the sum of all."
        )
    click.echo(json.dumps(figures, indent=1) if as_json else text)


def _also_here(options: MergeOptions) -> None:
    """Show a traceback also if `-v`, which is an option of mergekit too, comes after the command."""
    if options.verbosity:
        click.get_current_context().find_root().params["verbose"] = True


def _read(path: Path, methods: Sequence[str]) -> tuple[str, MergeConfiguration]:
    """Read a configuration of one of these methods: its text, and what is made of it, of `mediator` for artifacts.

    Raises:
        ConfigError: the file cannot be read, mergekit refuses it, or its merge method is another one.
    """
    plugin.install()
    try:
        source = path.read_text(encoding="utf-8")
        content = yaml.safe_load(source)
        if not isinstance(content, dict):
            raise ConfigError(
                f"{path}: a mapping with merge_method, base_model and models is required, got "
                f"{type(content).__name__}"
            )
        config = MergeConfiguration.model_validate(content)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RuntimeError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {place}: {first_line(ValueError(first['msg']))}") from error
    if config.merge_method not in methods:
        raise ConfigError(
            f"{path}: merge_method of {', '.join(methods)} required, got {config.merge_method}: use mergekit-yaml"
        )
    return source, as_mediator(config)
