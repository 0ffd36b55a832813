"""The command `evaluate`: systems against tasks, as a table, JSON and a picture."""

import json
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import click

from mergekit_mediator.cli.plots import plot_quality
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
    sizes,
)
from mergekit_mediator.evaluate.tasks import load_tasks, split
from mergekit_mediator.serve.model import MediatorModel


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
@click.option("--each", is_flag=True, help="With --experts: every expert on every task.")
@click.option("--rivals", default="", help="Their names, separated by commas, or all.")
@click.option(
    "--rank",
    "ranks",
    type=click.IntRange(min=1),
    multiple=True,
    default=(16,),
    help="Of extracted adapters.",
)
@click.option("--base", help="Where the base is, if not where the merge found it.")
@click.option("--expert", "given", multiple=True, help="NAME=MODEL: where an expert is, likewise.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=64, show_default=True, help="Examples per task."
)
@click.option(
    "--tune",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Others, to choose coefficients on.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of all models; auto is the stored one. With float32 no score depends on its batch.",
)
@click.option("--seed", default=7, show_default=True, help="Of generated tasks.")
@click.option(
    "--out",
    "work",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for table, JSON and picture; keeps merges and scores for the next time.",
)
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Let code run that comes with the models; read it first.",
)
@click.option("--json", "as_json", is_flag=True, help="Print figures as JSON.")
def evaluate(
    out: str,
    tasks: tuple[str, ...],
    with_experts: bool,
    each: bool,
    rivals: str,
    ranks: tuple[int, ...],
    base: str | None,
    given: tuple[str, ...],
    limit: int,
    tune: int,
    dtype: str,
    seed: int,
    work: Path | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Score the artifact in OUT on tasks: dense, with each task's own expert, and routed.

    NAME is the expert that a task belongs to. A line of FILE.jsonl is {"prompt": ..., "answer": ...}.
    Rivals are average, task_arithmetic, ties, dare_ties, della, extract_lora, twin_merging and
    best_expert, made from the models that OUT was merged from.

    Example: mergekit-mediator evaluate OUT --task math=math.jsonl --task code=code.jsonl --rivals all
    --out report
    """
    names = _rivals(rivals)
    loaded = load_tasks(tasks, limit + (tune if names else 0), seed)
    reported, tuning = split(loaded, limit) if names else (loaded, {})
    model = MediatorModel.from_pretrained(out, trust_remote_code=trust_remote_code)
    stored = sizes(model)
    if dtype != "auto":
        del model  # before the other one is there
        model = MediatorModel.from_pretrained(out, dtype=dtype, trust_remote_code=trust_remote_code)
    routing = route(model, reported)
    from_manifest = {entry.name: entry.source for entry in model.manifest.experts}
    places = from_manifest | _pairs(given, model.experts)
    start = model.manifest.base.source if base is None else base
    results: list[SystemResult] = []
    with ExitStack() as stack:
        if work is not None:
            _make(work)
        folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        scorer = Scorer(model.tokenizer, folder / "scores.json", as_json, dtype, trust_remote_code)
        wanted = with_experts or each or bool(names)
        if wanted or base is not None:
            start = located("the base", start)
            results.append(base_system(scorer, reported, start))
        if wanted:
            experts = {name: located(f"expert {name}", place) for name, place in places.items()}
            results += expert_systems(scorer, reported, experts, each)
        mine = mediator_systems(model, scorer, reported, routing, stored)
        if names:
            from mergekit_mediator.evaluate.rival_systems import RivalSystems
            from mergekit_mediator.evaluate.rivals import Rivals

            made = Rivals(start, experts, folder / "merges", trust_remote_code)
            systems = RivalSystems(made, scorer, reported, tuning, routing, base_bytes(model))
            results += systems.score(names, ranks)
            moved = {source: experts[name] for name, source in from_manifest.items()}
            try:
                _, seconds = made.again(model.root / "mergekit_config.yml", moved)
            except MediatorError as error:  # what was scored is worth more than this figure
                click.echo(f"warning: the time of the merge is not measured: {error}", err=True)
            else:
                taken = {"merge_cpu_seconds": seconds}
                mine = [replace(m, figures={**m.figures, **taken}) for m in mine]
        rows = to_json([*results, *mine])
        figures = {
            "prompts_per_task": {name: len(task.examples) for name, task in reported.items()},
            "systems": rows,
            "routing": {name: found.figures(model.experts) for name, found in routing.items()},
        }
        if work is not None:
            (work / "evaluation.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
            (work / "evaluation.md").write_text(to_markdown(rows), encoding="utf-8")
            try:
                plot_quality(rows, work / "evaluation.png")
            except OutputError as error:  # table and JSON are there all the same
                click.echo(f"warning: {error}", err=True)
    click.echo(json.dumps(figures, indent=1) if as_json else to_markdown(rows))


def _make(folder: Path) -> None:
    """Make the folder of a report before anything is scored, which takes long."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be created: {error.strerror}") from error


def _rivals(text: str) -> tuple[str, ...]:
    """Known names; mergekit, which makes them, is imported only where there are some."""
    if not text:
        return ()
    from mergekit_mediator.evaluate.rivals import known

    return known(text.split(","))


def _pairs(given: tuple[str, ...], known: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for text in given:
        name, _, source = text.partition("=")
        if not name or not source:
            raise click.BadParameter(f"{text!r}: NAME=MODEL required")
        if name not in known:
            raise click.BadParameter(f"no expert {name!r}: this artifact has {', '.join(known)}")
        pairs[name] = source
    return pairs
