"""Tables for people: what will be merged, what budgets would keep, and what a router does."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergekit_mediator.delta.curve import Point
    from mergekit_mediator.merge.estimate import Estimate


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text: the first to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def size(count: float) -> str:
    """A number of bytes, as people write it."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def plan_report(estimate: "Estimate") -> str:
    """What a merge will do, layer by layer."""
    decisions = {True: "routed", False: "averaged", None: "undecided"}
    rows = []
    for layer in estimate.layers:
        metrics = layer.plan.metrics
        rows.append(
            [
                layer.plan.name,
                decisions[layer.plan.routed],
                *[f"{metrics[m]:.3f}" if metrics else "-" for m in ("sign", "mass", "dispersion")],
                f"{layer.parameters:,}",
                size(layer.read),
                size(layer.dense),
                size(layer.experts) if layer.experts else "-",
            ]
        )
    header = ["layer", "decision", "sign", "mass", "dispersion"]
    header += ["parameters", "read", "dense", "experts"]
    lines = [table(header, rows), ""]
    undecided = any(layer.plan.routed is None for layer in estimate.layers)
    if undecided:
        lines.append("Undecided layers depend on the conflict: add --conflict to measure it.")
    experts = "some" if undecided else f"about {size(estimate.experts)}"
    lines.append(
        f"Reads {size(estimate.read)} in {estimate.passes} pass{'es' * (estimate.passes > 1)}, "
        f"writes {size(estimate.dense)} of dense expert and {experts} of sparse "
        f"experts; needs about {size(estimate.peak_memory)} of memory."
    )
    return "\n".join(lines)


def plan_figures(estimate: "Estimate") -> dict[str, Any]:
    """The same as plain values, sizes in bytes."""
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


def curve_report(points: "Sequence[Point]") -> str:
    """What every budget would keep."""
    rows = [
        [
            f"{point.over_dense:g}x",
            size(point.total_bytes),
            f"{point.bits:.3f}",
            f"{100 * (1 - point.left):.1f}",
            f"{100 * point.loss_recovered:.1f}",
        ]
        for point in points
    ]
    header = ["budget", "everything", "bits/param", "change kept, %", "loss recovered, %"]
    return "\n".join(
        [
            table(header, rows),
            "",
            "Predicted from the weights alone, for all layers routed: the squared change from base to",
            "experts that is kept, and what that recovered of the loss of fine-tunes measured before.",
        ]
    )


def comparison_report(figures: dict[str, Any]) -> str:
    """Exact match in percent by system and task, and where the prompts were routed."""
    systems, routing = figures["systems"], figures["routing"]
    rows = []
    for system, scores in systems.items():
        values = [100 * scores[task]["accuracy"] for task in routing]
        rows.append([system, *[f"{v:.1f}" for v in values], f"{sum(values) / len(values):.1f}"])
    experts = list(next(iter(routing.values()))["chosen"])
    routes = [
        [task, *[str(entry["chosen"][e]) for e in experts], f"{entry['entropy']:.3f}"]
        for task, entry in routing.items()
    ]
    return "\n".join(
        [
            "exact match, %",
            table(["system", *routing, "mean"], rows),
            "",
            "prompts routed to each expert, and mean entropy in nats",
            table(["task", *experts, "entropy"], routes),
        ]
    )


def calibration_report(figures: dict[str, Any]) -> str:
    """What held-out prompts say of a router."""
    names = figures["experts"]
    rows = [
        [name, *map(str, counts)] for name, counts in zip(names, figures["confusion"], strict=True)
    ]
    return "\n".join(
        [
            f"held-out accuracy {figures['accuracy']:.3f}, expected calibration error "
            f"{figures['ece']:.3f}, temperature {figures['temperature']:.3g}",
            f"one expert below a normalised entropy of {figures['entropy_threshold']:.2f}, "
            f"out of distribution above {figures['ood_threshold']:.2f}",
            "",
            "held-out prompts of each expert (rows) routed to each expert",
            table(["", *names], rows),
        ]
    )
