"""The command `evaluate`: score systems on tasks, as a table, JSON and a picture."""

import json
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mergekit_mediator.cli import options
from mergekit_mediator.cli.plots import plot_evaluation, plot_quality
from mergekit_mediator.cli.publish import refresh
from mergekit_mediator.errors import MediatorError, OutputError
from mergekit_mediator.evaluate.contenders import located
from mergekit_mediator.evaluate.results import SystemResult, to_json, to_markdown
from mergekit_mediator.evaluate.scorer import Scorer
from mergekit_mediator.evaluate.systems import (
    base_bytes,
    base_system,
    expert_systems,
    mediator_systems,
    route,
    routing_reliability,
    sizes,
)
from mergekit_mediator.evaluate.tasks import load_tasks, source_of, split
from mergekit_mediator.serve.model import MediatorModel
from mergekit_mediator.store.evaluation import Evaluation, loaded_digest, write_evaluation


@click.command()
@click.argument("out")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    required=True,
    help="NAME=FILE.jsonl, NAME=gym:TASK or NAME=lm_eval:TASK.",
)
@click.option("--experts", "with_experts", is_flag=True, help="Score base and experts too.")
@click.option("--each", is_flag=True, help="Score every expert on every task too.")
@click.option("--rivals", default="", help="The names of rivals, separated by commas, or all.")
@click.option(
    "--rank",
    "ranks",
    type=click.IntRange(min=1),
    multiple=True,
    default=(16,),
    show_default=True,
    help="The rank of extracted adapters.",
)
@click.option("--base", help="The base's place, if it has moved since the merge.")
@click.option(
    "--expert",
    "moved",
    multiple=True,
    help="NAME=MODEL: an expert's place, if it has moved since the merge.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="The number of examples per task.",
)
@click.option(
    "--tune",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="The number of further examples per task; rivals' coefficients are chosen on them.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="The dtype of all models; auto is the stored one. With float32 no score depends on its batch.",
)
@click.option("--seed", default=7, show_default=True, help="The seed of generated tasks.")
@click.option(
    "--out",
    "work",
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder of table, JSON and picture; it keeps merges and scores for the next call.",
)
@options.plot("quality against bytes, and where the router sent the prompts of each task")
@click.option(
    "--no-record",
    is_flag=True,
    help="Do not keep the results in the artifact, for its card, `report` and `push`.",
)
@options.trust_remote_code
@options.as_json
def evaluate(
    out: str,
    tasks: tuple[str, ...],
    with_experts: bool,
    each: bool,
    rivals: str,
    ranks: tuple[int, ...],
    base: str | None,
    moved: tuple[str, ...],
    limit: int,
    tune: int,
    dtype: str,
    seed: int,
    work: Path | None,
    plot: Path | None,
    no_record: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Score the artifact in OUT on tasks: dense, with each task's own expert, and routed.

    NAME is the expert that a task belongs to. A line of FILE.jsonl is {"prompt": ..., "answer": ...}.
    The rivals are average, task_arithmetic, ties, dare_ties, della, tsvm, r_tsvm, iso_c, wudi, opcm,
    pcb, regmean_pp, extract_lora, twin_merging and best_expert; they are made from the models that OUT
    was merged from. regmean_pp reads the prompts of the examples that coefficients are chosen on.

    Example: mergekit-mediator evaluate OUT --task math=math.jsonl --task code=code.jsonl --rivals all
    --out report
    """
    names = _rivals(rivals)
    loaded = load_tasks(tasks, limit + (tune if names else 0), seed)
    reported, tuning = split(loaded, limit) if names else (loaded, {})
    model = MediatorModel.from_pretrained(out, trust_remote_code=trust_remote_code)
    stored = sizes(model)
    if dtype != "auto":
        del model  # before the second model takes memory
        model = MediatorModel.from_pretrained(out, dtype=dtype, trust_remote_code=trust_remote_code)
    routing = route(model, reported)
    sources = {entry.name: entry.source for entry in model.manifest.experts}
    places = sources | _pairs(moved, model.experts)
    base_place = model.manifest.base.source if base is None else base
    results: list[SystemResult] = []
    with ExitStack() as stack:
        if work is not None:
            _make(work)
        folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        scorer = Scorer(model.tokenizer, folder / "scores.json", as_json, dtype, trust_remote_code)
        needs_experts = with_experts or each or bool(names)
        if needs_experts or base is not None:
            base_place = located("the base", base_place)
            results.append(base_system(scorer, reported, base_place))
        if needs_experts:
            experts = {name: located(f"expert {name}", place) for name, place in places.items()}
            results += expert_systems(scorer, reported, experts, each)
        mediators = mediator_systems(model, scorer, reported, routing, stored)
        if names:
            from mergekit_mediator.evaluate.rival_systems import RivalSystems
            from mergekit_mediator.evaluate.rivals import Rivals

            maker = Rivals(base_place, experts, folder / "merges", trust_remote_code)
            systems = RivalSystems(maker, scorer, reported, tuning, routing, base_bytes(model))
            results += systems.score(names, ranks)
            new_places = {source: experts[name] for name, source in sources.items()}
            try:
                _, seconds = maker.again(model.root / "mergekit_config.yml", new_places)
            except MediatorError as error:  # the scores are worth more than this figure
                click.echo(f"warning: the time of the merge is not measured: {error}", err=True)
            else:
                cost = {"merge_cpu_seconds": seconds}
                mediators = [replace(m, figures={**m.figures, **cost}) for m in mediators]
        rows = to_json([*results, *mediators])
        figures = {
            "prompts_per_task": {name: len(task.examples) for name, task in reported.items()},
            "sources": {text.partition("=")[0]: source_of(text) for text in tasks},
            "systems": rows,
            "routing": {name: routed.figures(model.experts) for name, routed in routing.items()},
            "reliability": routing_reliability(routing),
        }
        if work is not None:
            (work / "evaluation.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
            (work / "evaluation.md").write_text(to_markdown(rows), encoding="utf-8")
            try:
                plot_quality(rows, work / "evaluation.png")
            except OutputError as error:  # table and JSON are written without a picture
                click.echo(f"warning: {error}", err=True)
    click.echo(json.dumps(figures, indent=1) if as_json else to_markdown(rows))
    if not no_record and Path(out).is_dir():
        _record(Path(out), {"artifact": loaded_digest(model.manifest), **figures})
        refresh(Path(out))
    if plot is not None:
        plot_evaluation(figures, plot)


def _record(root: Path, figures: dict[str, Any]) -> None:
    """Keep the results in the artifact; a warning tells of an artifact that cannot be written."""
    try:
        write_evaluation(root, Evaluation.model_validate(figures))
    except OSError as error:
        click.echo(f"warning: {root}: the results are not kept there: {error.strerror}", err=True)


def _make(folder: Path) -> None:
    """Make the folder of a report; this fails before a score, which takes long, is lost."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be created: {error.strerror}") from error


def _rivals(text: str) -> tuple[str, ...]:
    """Read the names of rivals. Only a rival needs mergekit, so it is imported here."""
    if not text:
        return ()
    from mergekit_mediator.evaluate.rivals import known

    return known(text.split(","))


def _pairs(texts: tuple[str, ...], experts: tuple[str, ...]) -> dict[str, str]:
    """Read NAME=MODEL texts: the model of each expert by its name."""
    pairs = {}
    for text in texts:
        name, _, source = text.partition("=")
        if not name or not source:
            raise click.BadParameter(f"NAME=MODEL is required, got {text!r}")
        if name not in experts:
            raise click.BadParameter(
                f"unknown expert {name!r}: this artifact has {', '.join(experts)}"
            )
        pairs[name] = source
    return pairs
