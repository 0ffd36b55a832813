"""Write tables and sizes for people, and the figures of systems and routers as tables."""

from collections.abc import Sequence
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns of text: the first to the left, the others to the right."""
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
    """Write a number of bytes with its unit, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def comparison_report(figures: dict[str, Any]) -> str:
    """Write the exact match in percent by system and task, and the experts that prompts were routed to."""
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
    """Write the figures of a router on held-out prompts."""
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
            *_auroc(figures),
            "",
            "held-out prompts of each expert (rows) routed to each expert",
            table(["", *names], rows),
        ]
    )


def _auroc(figures: dict[str, Any]) -> list[str]:
    """Write how well a router knows general requests; nothing if it was not measured."""
    if figures.get("ood_auroc") is None:
        return []
    return [
        f"AUROC {figures['ood_auroc']:.3f} between held-out prompts and {figures['ood_requests']} general requests"
    ]
