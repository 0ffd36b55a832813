"""The decision which layers are routed and which are averaged, by conflict, place or name."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mergekit_mediator.errors import ConfigError
from mergekit_mediator.merge.conflict import Conflict, Metric

Rule = Literal["auto", "all", "none", "conflict_threshold", "routed_fraction", "routed_layers"]


@dataclass(frozen=True)
class Selection:
    """A rule that chooses the layers to route.

    Attributes:
        rule: the name of the rule. `auto` chooses the layers whose conflict is above the mean of all layers.
        threshold: for `conflict_threshold`, choose layers whose conflict, in [0, 1], is above it.
        fraction: for `routed_fraction`, choose this fraction of the layers, in [0, 1].
        by_conflict: for `routed_fraction`, choose the layers of most conflict instead of those nearest the
            middle.
        layers: for `routed_layers`, choose these names and ranges, such as `embed,0-3,30`.
    """

    rule: Rule = "auto"
    threshold: float = 0.0
    fraction: float = 0.0
    by_conflict: bool = False
    layers: str = ""

    @property
    def needs_conflict(self) -> bool:
        """Whether the choice depends on the conflict of the layers."""
        if self.rule == "routed_fraction":
            return self.by_conflict
        return self.rule in ("auto", "conflict_threshold")


@dataclass(frozen=True)
class LayerPlan:
    """The plan for one layer.

    Attributes:
        name: `embed`, the number of a decoder block, or `final`. An architecture with several modules puts
            the module's name and a dot in front.
        weights: the names of its weights in the checkpoint, each at most once.
        conflict: the conflict of its weights; None before it is measured.
        routed: whether every expert keeps its own version; None while undecided.
    """

    name: str
    weights: tuple[str, ...]
    conflict: Conflict | None = None
    routed: bool | None = None

    @property
    def metrics(self) -> dict[Metric, float]:
        """The metrics of conflict that were measured, each in [0, 1]."""
        return self.conflict.metrics if self.conflict else {}


def plan_layers(
    places: Iterable[tuple[str, str]],
    selection: Selection,
    metric: Metric,
    conflicts: Mapping[str, Conflict],
) -> list[LayerPlan]:
    """Plan the layers in order; leave them undecided if the selection needs conflict and there is none.

    Args:
        places: the layer and the name of every weight, in order.
        selection: the rule.
        metric: the metric of conflict that the rule compares.
        conflicts: the conflict of each weight by name; empty before conflict is measured.

    Raises:
        ConfigError: `routed_layers` names a layer that the model does not have.
    """
    weights: dict[str, list[str]] = {}
    for layer, name in places:
        weights.setdefault(layer, []).append(name)
    plans = [
        LayerPlan(
            layer,
            tuple(dict.fromkeys(names)),
            sum((conflicts[name] for name in names), Conflict()) if conflicts else None,
        )
        for layer, names in weights.items()
    ]
    if selection.needs_conflict and not conflicts:
        return plans
    values = {plan.name: plan.conflict.value(metric) for plan in plans if plan.conflict}
    routed = select_routed(list(weights), selection, values)
    return [replace(plan, routed=plan.name in routed) for plan in plans]


def select_routed(
    layers: Sequence[str], selection: Selection, conflict: Mapping[str, float]
) -> frozenset[str]:
    """Choose the layers to route.

    Args:
        layers: the names of all layers, in order.
        selection: the rule.
        conflict: the metric of each layer; it may be empty if the rule does not need it.

    Returns:
        The names of the routed layers.

    Raises:
        ConfigError: `routed_layers` names a layer that the model does not have.
    """
    if selection.rule == "all":
        return frozenset(layers)
    if selection.rule == "none":
        return frozenset()
    if selection.rule == "routed_layers":
        return parse_layers(selection.layers, layers)
    if selection.rule == "routed_fraction":
        if selection.by_conflict:
            ranked = sorted(layers, key=lambda name: -conflict[name])
        else:
            ranked = nearest_middle(layers)
        return frozenset(ranked[: round(selection.fraction * len(layers))])
    threshold = selection.threshold
    if selection.rule == "auto":
        mean = math.fsum(conflict[name] for name in layers) / len(layers)
        # rounding may put the mean of equal numbers below all of them
        threshold = max(mean, min(conflict[name] for name in layers))
    return frozenset(name for name in layers if conflict[name] > threshold)


def parse_layers(text: str, layers: Sequence[str]) -> frozenset[str]:
    """Read a list of layers such as `embed,0-3,30`.

    Args:
        text: names and ranges, with commas between them.
        layers: the names of all layers.

    Raises:
        ConfigError: an entry is neither a layer nor a range of layers, or a range runs backwards.
    """
    routed: set[str] = set()
    for entry in (part.strip() for part in text.split(",")):
        span = re.fullmatch(r"((?:[^,]*\.)?)(\d+)-(\d+)", entry)
        if span:
            prefix, first, last = span[1], int(span[2]), int(span[3])
            if last < first:
                raise ConfigError(f"routed_layers: range {entry!r} runs backwards: swap its ends")
            names = [f"{prefix}{i}" for i in range(first, last + 1)]
        else:
            names = [entry]
        unknown = [name for name in names if name not in layers]
        if unknown:
            raise ConfigError(
                f"routed_layers: {entry!r} is not in this model, whose layers are {_span(layers)}"
            )
        routed.update(names)
    return frozenset(routed)


def _span(layers: Sequence[str]) -> str:
    """Shorten the names of all layers, such as `embed, 0-29, final`."""
    parts: list[str] = []
    for name in layers:
        previous = parts[-1] if parts else ""
        first, _, last = previous.partition("-")
        if name.isdigit() and (last or first).isdigit():
            parts[-1] = f"{first}-{name}"
        else:
            parts.append(name)
    return ", ".join(parts)


def nearest_middle(layers: Sequence[str]) -> list[str]:
    """Sort layers by their distance from the middle block of their module, with other layers last."""
    distances = _distances(layers)
    return sorted(layers, key=lambda name: distances.get(name, 2.0))


def _distances(layers: Iterable[str]) -> dict[str, float]:
    """Compute the distance of each decoder block from the middle of its module: 1 for the first and the last."""
    blocks: defaultdict[str, set[tuple[int, str]]] = defaultdict(set)
    for name in layers:
        module, _, last = name.rpartition(".")
        if last.isdigit():
            blocks[module].add((int(last), name))
    distances = {}
    for numbered in blocks.values():
        for i, (_, name) in enumerate(sorted(numbered)):
            distances[name] = abs(2 * i / (len(numbered) - 1) - 1) if len(numbered) > 1 else 0.5
    return distances
