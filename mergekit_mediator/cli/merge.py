"""The commands that need mergekit: merge and plan."""

import json
import tempfile
from pathlib import Path

import click
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions, add_merge_options
from pydantic import ValidationError

from mergekit_mediator.cli import tables as report
from mergekit_mediator.cli.plots import plot_conflict, plot_curve
from mergekit_mediator.errors import ConfigError, first_line
from mergekit_mediator.merge import plugin
from mergekit_mediator.merge.budget import check_budget, predict
from mergekit_mediator.merge.config import METHOD
from mergekit_mediator.merge.estimate import dense_sizes, estimate
from mergekit_mediator.merge.inputs import Inputs
from mergekit_mediator.merge.passes import Measured, Passes
from mergekit_mediator.merge.run import plan_layers, run
from mergekit_mediator.merge.tuning import read_all_prompts
from mergekit_mediator.merge.unknown_keys import check_keys
from mergekit_mediator.merge.workers import workers

_config = click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))


@click.command()
@_config
@click.argument("out")
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace a model that OUT holds already; other files there stay.",
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
    source, merge_config = _read(config)
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
@click.option("--conflict", is_flag=True, help="Measure conflict: reads every weight once.")
@click.option(
    "--curve", is_flag=True, help="Predict quality for every budget: reads every weight once."
)
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw either: FILE.png."
)
@click.option("--json", "as_json", is_flag=True, help="Print figures as JSON.")
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
        raise click.UsageError("--plot draws what one of --conflict and --curve finds: give one")
    _, merge_config = _read(config)
    with tempfile.TemporaryDirectory() as merged_adapters:
        if merge_options.lora_merge_cache is None:
            merge_options = merge_options.model_copy(update={"lora_merge_cache": merged_adapters})
        inputs = Inputs(merge_config, merge_options)
        read_all_prompts(inputs.config)  # what a merge would refuse
        try:
            inputs.open() if conflict or curve else inputs.peek()
            weights = inputs.weights()
            check_budget(inputs.config, dense_sizes(inputs, weights))
            measured: dict[str, Measured] = {}
            if conflict or curve:
                with workers() as over:
                    found = Passes(inputs, over).first(
                        weights, with_costs=curve, only_conflict=True
                    )
                    measured = {weight.info.name: conflict for weight, conflict in found}
            plans = plan_layers(inputs, weights, measured)
            estimated = estimate(inputs, weights, plans)
            points = predict(inputs, weights, measured) if curve else []
        finally:
            inputs.close()
    if plot is not None and curve:
        plot_curve(plot, points)
    elif plot is not None:
        profile = {m: [p.metrics[m] for p in plans] for m in ("sign", "mass", "dispersion")}
        plot_conflict(plot, [p.name for p in plans], profile, [p.routed for p in plans])
    figures = report.plan_figures(estimated) | (
        {"curve": [vars(p) for p in points]} if curve else {}
    )
    text = report.plan_report(estimated)
    if curve:
        text += f"\n\n{report.curve_report(points)}"
    elif inputs.config.density_decides:
        text += (
            "\nA budget keeps more in as many bytes, if not bit for bit: --curve predicts how much."
        )
    click.echo(json.dumps(figures, indent=1) if as_json else text)


def _also_here(options: MergeOptions) -> None:
    """`-v` is mergekit's option too: after the command it also shows a traceback."""
    if options.verbosity:
        click.get_current_context().find_root().params["verbose"] = True


def _read(path: Path) -> tuple[str, MergeConfiguration]:
    """A configuration's text, and what mergekit reads in it."""
    plugin.install()
    try:
        source = path.read_text(encoding="utf-8")
        content = yaml.safe_load(source)
        if not isinstance(content, dict):
            raise ConfigError(
                f"{path}: a mapping with merge_method, base_model and models required"
            )
        config = MergeConfiguration.model_validate(content)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RuntimeError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {place}: {first_line(ValueError(first['msg']))}") from error
    if config.merge_method != METHOD:
        raise ConfigError(
            f"{path}: merge_method is {config.merge_method}, not {METHOD}: use mergekit-yaml"
        )
    check_keys(source, config)
    return source, config
