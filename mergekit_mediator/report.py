"""Tables for people: what will be merged, and what an artifact holds."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_mediator import artifact
from mergekit_mediator.artifact import Manifest
from mergekit_mediator.card import conflict_chart

if TYPE_CHECKING:
    from mergekit_mediator.curve import Point
    from mergekit_mediator.estimate import Estimate


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
    if any(layer.plan.routed is None for layer in estimate.layers):
        lines.append("Undecided layers depend on the conflict: add --conflict to measure it.")
    lines.append(
        f"Reads {size(estimate.read)} in {estimate.passes} pass{'es' * (estimate.passes > 1)}, "
        f"writes {size(estimate.dense)} of dense expert and about {size(estimate.experts)} of sparse "
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


def inspect_figures(root: Path, manifest: Manifest) -> dict[str, Any]:
    """What an artifact holds as plain values: sizes in bytes, rates in bits per parameter."""
    experts = []
    for entry in manifest.experts:
        file = artifact.open_expert(root, entry)
        stored = manifest.files[f"mediator/{entry.file}"].bytes
        parameters = sum(description.numel for description in file.weights.values())
        experts.append(
            {
                "name": entry.name,
                "source": entry.source,
                "weight": entry.weight,
                "bytes": stored,
                "routed_parameters": parameters,
                "bits_per_parameter": 8 * stored / parameters if parameters else 0.0,
            }
        )
    dense = sum(
        d.bytes for name, d in manifest.files.items() if "/" not in name and _is_weights(name)
    )
    total = sum(d.bytes for d in manifest.files.values())
    return {
        "base": manifest.base.source,
        "parameters": manifest.parameter_count,
        "dense_bytes": dense,
        "total_bytes": total,
        "total_over_dense": total / dense if dense else 0.0,
        "experts": experts,
        "layers": [layer.model_dump(exclude={"weights"}) for layer in manifest.layers],
        "settings": manifest.parameters,
        "router": manifest.router,
    }


def inspect_report(figures: dict[str, Any]) -> str:
    """What an artifact holds, for reading."""
    layers, metric = figures["layers"], figures["settings"]["conflict"]
    routed = sum(layer["routed"] for layer in layers)
    chart = conflict_chart(
        [layer["name"] for layer in layers],
        [layer["conflict"].get(metric, 0.0) for layer in layers],
        [layer["routed"] for layer in layers],
    )
    rows = [
        [
            expert["name"],
            size(expert["bytes"]),
            f"{expert['bits_per_parameter']:.3f}",
            str(expert["weight"]),
            expert["source"],
        ]
        for expert in figures["experts"]
    ]
    return "\n".join(
        [
            f"base {figures['base']}, {figures['parameters']:,} parameters",
            f"dense expert {size(figures['dense_bytes'])}, all files {size(figures['total_bytes'])} "
            f"= {figures['total_over_dense']:.3f} of the dense expert",
            "",
            table(["expert", "bytes", "bits/param", "weight", "source"], rows),
            "",
            f"{metric} conflict by layer; {routed} of {len(layers)} layers routed (#)",
            chart,
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


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))
