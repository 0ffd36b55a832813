"""The text of the generated part of a model card."""

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_mediator.store.calibration import Calibration, calibration_of
from mergekit_mediator.store.evaluation import Evaluation, SystemRecord
from mergekit_mediator.store.manifest import PICTURES, RESPONSE, Manifest

_BAR = 30
_LAYERS, _ROUTER, _EVALUATION = PICTURES
# The systems of every evaluation, for people who have not run one.
LEGEND = (
    "System mediator routes each request, mediator_oracle is told the expert of each task, and mediator_dense is the dense "
    "expert alone."
)


def card_text(
    manifest: Manifest, evaluation: Evaluation | None, pictures: Sequence[str] = ()
) -> str:
    """Write conflict, sizes, routing, evaluation and limits of an artifact in Markdown.

    Args:
        manifest: the artifact's manifest.
        evaluation: the artifact's evaluation, if there was one.
        pictures: the pictures that the artifact has.

    Raises:
        ArtifactError: the manifest's figures of the router are damaged.
    """
    calibration = calibration_of(manifest)
    sections = [
        _conflict(manifest, _LAYERS in pictures),
        *_kept(manifest),
        _routing(manifest, calibration, _ROUTER in pictures),
        _results(evaluation, _EVALUATION in pictures),
        *_changes(manifest),
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits(manifest, evaluation)),
    ]
    return "\n\n".join(sections) + "\n"


def limits(manifest: Manifest, evaluation: Evaluation | None) -> list[str]:
    """List in sentences what the artifact does not do, and what its dense expert is worth alone.

    Args:
        manifest: the artifact's manifest.
        evaluation: the artifact's evaluation, if there was one.
    """
    dense = evaluation.systems.get("mediator_dense") if evaluation else None
    worth = "It has not been measured what the dense expert is worth alone."
    if dense is not None and dense.normalized_mean is not None:
        worth = (
            f"Alone it keeps {dense.normalized_mean:.0f}% of the experts' exact match, and "
            f"{dense.normalized_worst or 0:.0f}% on its worst task."
        )
    skill = "which has none of the experts' full skill"
    if manifest.merged_by is not None:
        skill = f"their merge by `{manifest.merged_by}`, not any of the experts"
    return [
        f"Tools that know nothing of mergekit-mediator load the dense expert, {skill}. {worth}",
        _fidelity(manifest),
        "The router knows the wordings of the prompts that it was calibrated with; other wordings are routed "
        "worse."
        if manifest.router
        else "The router was given no examples: where the base model does not tell tasks apart, it guesses.",
        "Each expert has the limits and biases of the model that it was made from: read its card, too.",
    ]


def results_table(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of a table of all systems: what is kept, and exact match by task, in percent."""
    tasks = list(evaluation.sources)
    head = ["system", "kept, mean", "kept, worst", "bytes / model", *tasks]
    return head, [_row(name, system, tasks) for name, system in evaluation.systems.items()]


def said_of_routing(evaluation: Evaluation) -> str:
    """Say how many examples the router gives to the expert of their task; an empty text if it was not measured."""
    routed = evaluation.systems.get("mediator")
    if routed is None or routed.routing_accuracy is None:
        return ""
    return f"The router gives {routed.routing_accuracy:.1%} of the examples to the expert of their task."


def example_counts(evaluation: Evaluation) -> dict[str, int]:
    """The number of examples of each task."""
    scores = next(iter(evaluation.systems.values())).tasks
    return {task: scores[task].n for task in evaluation.sources}


def conflict_chart(
    layers: Sequence[str], values: Sequence[float], routed: Sequence[bool | None]
) -> str:
    """Draw one line of text for each layer: its name, its conflict in [0, 1], and a bar.

    Args:
        layers: the names of the layers.
        values: the conflict of each layer.
        routed: for each layer whether it is routed; None counts as averaged.
    """
    width = max(map(len, layers), default=0)
    lines = []
    for layer, value, is_routed in zip(layers, values, routed, strict=True):
        bar = ("#" if is_routed else ".") * round(value * _BAR)
        lines.append(f"{layer:>{width}} {value:.3f} {bar}".rstrip())
    return "\n".join(lines)


def _conflict(manifest: Manifest, has_picture: bool) -> str:
    metric = manifest.parameters.get("conflict", "mass")
    routed = len(manifest.routed_layers)
    head = f"## Conflict and sizes\n\n{routed} of {len(manifest.layers)} layers are routed."
    head += _sizes(manifest)
    if has_picture:
        return (
            f"{head}\n\n![Conflict of the experts' changes by layer, and the bytes that each expert stores of it]"
            f"({_LAYERS})"
        )
    if not any(layer.conflict for layer in manifest.layers):
        return head
    chart = conflict_chart(
        [layer.name for layer in manifest.layers],
        [layer.conflict.get(metric, 0.0) for layer in manifest.layers],
        [layer.routed for layer in manifest.layers],
    )
    return (
        f"{head}\n\n`{metric}` conflict of the experts' changes by layer; `#` layers are routed, `.` layers "
        f"averaged.\n\n```\n{chart}\n```"
    )


def _sizes(manifest: Manifest) -> str:
    files = {name: file.bytes for name, file in manifest.files.items()}
    weights = sum(
        n for name, n in files.items() if "/" not in name and name.endswith(".safetensors")
    )
    if not weights:
        return ""
    total, experts = sum(files.values()), sum(files[f"mediator/{e.file}"] for e in manifest.experts)
    return (
        f" The dense expert takes {_size(weights)}, the experts together {_size(experts)}: all files "
        f"are {total / weights:.3f} times the dense expert."
    )


def _size(count: int) -> str:
    """Write a number of bytes with its unit, in powers of 1000."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1000:.1f} kB"


def _routing(manifest: Manifest, router: Calibration | None, has_picture: bool) -> str:
    if router is None:
        how = "Requests are routed without example prompts, by how each expert's change responds to them."
        if RESPONSE not in manifest.files:
            how = "There is no router yet: name the expert of each request."
        return f"## Routing\n\n{how} Twenty prompts of each expert, and `calibrate`, route better."
    counts = sorted(router.prompts.values())
    prompts = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
    text = (
        f"## Routing\n\nThe router was calibrated with {prompts} prompts of each expert. Of the prompts that were held "
        f"out, which are worded otherwise, it gives {router.accuracy:.1%} to their own expert; its expected "
        f"calibration error is {router.ece:.3f}. {router.said_of_ood}"
    ).rstrip()
    if has_picture:
        alt = "Held-out prompts of each expert by chosen expert, and accuracy against confidence"
        return f"{text}\n\n![{alt}]({_ROUTER})"
    rows = [
        [name, *map(str, counts)]
        for name, counts in zip(router.experts, router.confusion, strict=True)
    ]
    return f"{text}\n\n{_table(['held-out prompts of', *router.experts], rows)}"


def _results(evaluation: Evaluation | None, has_picture: bool) -> str:
    if evaluation is None:
        return "## Evaluation\n\nThis model has not been evaluated."
    counts = example_counts(evaluation)
    sources = ", ".join(f"`{evaluation.sources[task]}` ({n})" for task, n in counts.items())
    head, rows = results_table(evaluation)
    rows = [[f"`{name}`", *cells] for name, *cells in rows]
    text = (
        f"## Evaluation\n\nExact match in percent on {sources}, the number of examples in brackets. *Kept* is "
        f"relative to each task's expert. {LEGEND} {said_of_routing(evaluation)}".rstrip()
        + f"\n\n{_table(head, rows)}"
    )
    if has_picture:
        alt = "Quality against bytes, and where the router sent the prompts of each task"
        text += f"\n\n![{alt}]({_EVALUATION})"
    return text


def _kept(manifest: Manifest) -> list[str]:
    """The section of the part of its gain that each expert keeps; none without `keep`."""
    parts: Mapping[str, Mapping[str, Any]] = manifest.parameters.get("kept") or {}
    lines = []
    for name, part in parts.items():
        if part["measured"] is not None:
            lines.append(f"- {name}: {part['measured']:.4f}, measured on held-out prompts")
        else:
            lines.append(f"- {name}: {part['predicted']:.4f}, predicted")
    if not lines:
        return []
    head = "## Kept\n\nThe part of its gain over the dense expert that each expert keeps:\n\n"
    tried = [f"{name} {_nats(part)}" for name, part in parts.items() if part.get("divergences")]
    divided = (
        "\n\nThe budget was divided so that the experts' answers to prompts diverge least. Measured at each division "
        f"that was tried, before tuning, in nats per answer: {'; '.join(tried)}."
    )
    return [head + "\n".join(lines) + (divided if tried else "")]


def _nats(part: Mapping[str, Any]) -> str:
    return ", ".join(f"{nats:.2g}" for nats in part["divergences"])


def _changes(manifest: Manifest) -> list[str]:
    """The section of the changes since the merge; none without changes."""
    notes = [f"- {change.note}" for change in manifest.history]
    return ["## Changes since the merge\n\n" + "\n".join(notes)] if notes else []


def _row(name: str, system: SystemRecord, tasks: Sequence[str]) -> list[str]:
    kept, size = (system.normalized_mean, system.normalized_worst), system.total_bytes_over_base
    return [
        name,
        *("-" if share is None else f"{share:.1f}" for share in kept),
        "-" if size is None else f"{size:.3f}",
        *(f"{100 * system.tasks[task].accuracy:.1f}" for task in tasks),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _fidelity(manifest: Manifest) -> str:
    """Say how exactly the experts come back."""
    settings = manifest.parameters
    if "bits" in settings or "budget" in settings:
        return "The experts come back nearly, not exactly: they are stored in fewer bits than their models."
    if settings.get("density") == 1.0 and settings.get("values") == "exact":
        return (
            "In routed layers each expert comes back exactly; averaged layers are the same for all."
        )
    return "The experts come back as far as their changes are stored: `inspect` shows how much of each layer."
