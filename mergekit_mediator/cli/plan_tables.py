"""Write the tables and figures of `plan`: a merge layer by layer, and the predicted quality of each budget."""

from collections.abc import Sequence
from typing import Any

from mergekit_mediator.cli.tables import size, table
from mergekit_mediator.delta.curve import KeptPoint, Point
from mergekit_mediator.merge.conflict import METRICS
from mergekit_mediator.merge.estimate import Estimate
from mergekit_mediator.merge.prompted.plan import PromptedPlan


def plan_report(estimate: Estimate) -> str:
    """Write a merge as a table, layer by layer."""
    decisions = {True: "routed", False: "averaged", None: "undecided"}
    rows = []
    for layer in estimate.layers:
        metrics = layer.plan.metrics
        rows.append(
            [
                layer.plan.name,
                decisions[layer.plan.routed],
                *[f"{metrics[m]:.3f}" if m in metrics else "-" for m in METRICS],
                f"{layer.parameters:,}",
                size(layer.read),
                size(layer.dense),
                size(layer.experts) if layer.experts else "-",
            ]
        )
    header = ["layer", "decision", *METRICS]
    header += ["parameters", "read", "dense", "experts"]
    lines = [table(header, rows), ""]
    undecided = any(layer.plan.routed is None for layer in estimate.layers)
    if undecided:
        lines.append("Undecided layers depend on the conflict: add --conflict to measure it.")
    unknown = undecided or (estimate.passes > 1 and not estimate.experts)
    experts = "some" if unknown else f"about {size(estimate.experts)}"
    lines.append(
        f"Reads {size(estimate.read)} in {estimate.passes} pass{'es' * (estimate.passes > 1)}, "
        f"writes {size(estimate.dense)} of dense expert and {experts} of sparse "
        f"experts; needs about {size(estimate.peak_memory)} of memory."
    )
    return "\n".join(lines)


def prompted_report(needs: PromptedPlan) -> str:
    """Write in a sentence or two what a merge by a method with prompts needs."""
    counts = ", ".join(f"{count} of {model}" for model, count in needs.prompts.items())
    return (
        f"Prompts: {counts}.\n"
        f"Reads about {size(needs.read)}, writes {size(needs.dense)}; needs about {size(needs.peak_memory)} of memory, "
        f"and {size(needs.scratch)} of disk in the temporary folder. One model is in memory, in float32."
    )


def plan_figures(estimate: Estimate) -> dict[str, Any]:
    """Describe a merge in plain values, sizes in bytes."""
    return {
        "layers": [
            {
                "name": layer.plan.name,
                "routed": layer.plan.routed,
                "conflict": layer.plan.metrics or None,
                "parameters": layer.parameters,
                "read": layer.read,
                "dense": layer.dense,
                "experts": layer.experts,
            }
            for layer in estimate.layers
        ],
        "passes": estimate.passes,
        "read": estimate.read,
        "dense": estimate.dense,
        "experts": estimate.experts,
        "peak_memory": estimate.peak_memory,
    }


def kept_report(points: Sequence[KeptPoint]) -> str:
    """Write the predicted bytes of a few values of `keep` as a table."""
    rows = [
        [
            f"{point.keep:g}",
            f"{point.over_dense:.3f}x",
            size(point.total_bytes),
            size(point.expert_bytes),
            f"{point.bits:.3f}",
            str(point.signs),
        ]
        for point in points
    ]
    header = ["keep", "of one model", "everything", "experts", "bits/param", "stored as signs"]
    return table(header, rows)


def curve_report(points: Sequence[Point]) -> str:
    """Write the predicted quality of every budget as a table."""
    is_noise = any(point.is_noise for point in points)
    rows = [
        [
            f"{point.over_dense:g}x",
            size(point.total_bytes),
            f"{point.bits:.3f}",
            f"{100 * (point.left if is_noise else 1 - point.left):.1f}",
            f"{100 * point.kept:.1f}",
        ]
        for point in points
    ]
    second = "error, %" if is_noise else "change kept, %"
    header = ["budget", "everything", "bits/param", second, "gain kept, %"]
    first = "error, noise of signs, is over" if is_noise else "change kept is a part of"
    return "\n".join(
        [
            table(header, rows),
            "",
            f"The weights alone predict these figures, for all layers routed. The {first}",
            "the squared change from base to experts; the gain kept is the least that any fine-tune kept",
            "that was measured before: narrow ones, broad ones, and one whose change is large beside the base.",
        ]
    )
