"""Score an artifact on the tasks of its experts: dense, with each task's own expert, and routed."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from mergekit_mediator.errors import TaskError
from mergekit_mediator.evaluate.contenders import Contender, checkpoint, mixed
from mergekit_mediator.evaluate.results import (
    BASE,
    DENSE,
    EXPERTS,
    OWN_EXPERT,
    ROUTED,
    SystemResult,
)
from mergekit_mediator.evaluate.scorer import Scorer, Tasks
from mergekit_mediator.evaluate.tasks import Example
from mergekit_mediator.models.prompts import render
from mergekit_mediator.route.confidence import reliability
from mergekit_mediator.serve.mixture import Mixture
from mergekit_mediator.serve.model import MediatorModel

# The figures of size, as ratios to the base: of the dense expert alone, and of the whole artifact.
Sizes = tuple[dict[str, float], dict[str, float]]


@dataclass(frozen=True)
class Routing:
    """The routing of a task's examples by an artifact's router and policy.

    Attributes:
        mixtures: the mixture of each example.
        likeliest: the likeliest expert of each example.
        confidence: the probability of the likeliest expert of each example.
        entropy: the mean entropy over the examples, in nats.
    """

    mixtures: tuple[Mixture, ...]
    likeliest: tuple[str, ...]
    confidence: tuple[float, ...]
    entropy: float

    def figures(self, experts: Sequence[str]) -> dict[str, Any]:
        """Return `chosen`, the number of examples by their likeliest expert, and `entropy` in nats."""
        counts = {expert: self.likeliest.count(expert) for expert in experts}
        return {"chosen": counts, "entropy": self.entropy}


def route(model: MediatorModel, tasks: Tasks) -> dict[str, Routing]:
    """Route every example by its prompt alone.

    Raises:
        TaskError: a task has not the name of an expert, or the artifact has no tokenizer.
    """
    if model.tokenizer is None:
        raise TaskError(
            f"{model.root}: the artifact has no tokenizer, and a task needs one: merge from a base "
            "that has a tokenizer"
        )
    for name in tasks:
        if name not in model.experts:
            raise TaskError(
                f"task {name!r}: the name of its expert is required: choose from "
                f"{', '.join(model.experts)}"
            )
    return {name: _route(model, task.examples) for name, task in tasks.items()}


def routing_accuracy(routing: Mapping[str, Routing]) -> float:
    """Compute the fraction of examples, 0 to 1, whose likeliest expert is the expert of their task."""
    matches = [expert == task for task, routed in routing.items() for expert in routed.likeliest]
    return sum(matches) / len(matches)


def routing_reliability(routing: Mapping[str, Routing]) -> list[tuple[int, float, float]]:
    """Compare the router's confidence in the likeliest expert with its accuracy, over the examples of all tasks.

    Returns:
        For each bin of confidence: the number of examples, their mean confidence and their accuracy.
    """
    confidence = [c for routed in routing.values() for c in routed.confidence]
    hits = [expert == task for task, routed in routing.items() for expert in routed.likeliest]
    return reliability(torch.tensor(confidence), torch.tensor(hits))


def mediator_systems(
    model: MediatorModel,
    scorer: Scorer,
    tasks: Tasks,
    routing: Mapping[str, Routing] | None = None,
    stored: Sizes | None = None,
) -> list[SystemResult]:
    """Score an artifact without experts, with each task's own expert, and routed.

    Args:
        model: the artifact.
        scorer: the scorer of all systems.
        tasks: the tasks, by the name of their expert.
        routing: the artifact's routing of the tasks; None computes it.
        stored: the sizes of the artifact in its stored dtype; None takes those of the model.

    Raises:
        MediatorError: see `Scorer.score`.
    """
    routing = routing if routing is not None else route(model, tasks)
    dense_sizes, all_sizes = stored if stored is not None else sizes(model)
    experts = {name: [mixed(model, {name: 1.0})] * len(t.examples) for name, t in tasks.items()}
    mixtures = {name: [mixed(model, m) for m in r.mixtures] for name, r in routing.items()}
    return [
        SystemResult(DENSE, scorer.alike(DENSE, tasks, mixed(model, {})), dense_sizes),
        SystemResult(OWN_EXPERT, scorer.score(OWN_EXPERT, tasks, experts), all_sizes),
        SystemResult(
            ROUTED,
            scorer.score(ROUTED, tasks, mixtures),
            {**all_sizes, "routing_accuracy": routing_accuracy(routing)},
        ),
    ]


def sizes(model: MediatorModel) -> Sizes:
    """Compute the bytes of weights and routers, on disk and in memory, over those of the base's weights.

    Returns:
        The sizes of the dense expert alone, and of the whole artifact with all experts decoded.
    """
    base = base_bytes(model)
    memory = sum(p.numel() * p.element_size() for p in model.model.parameters())
    for name in model.experts:
        with model.mixture({name: 1.0}):
            pass  # the first use of an expert decodes it, and from then on its bytes are resident
    weights = {path: f.bytes for path, f in model.manifest.files.items() if ".safetensors" in path}
    dense = sum(size for path, size in weights.items() if "/" not in path)
    return (
        {"total_bytes_over_base": dense / base, "resident_bytes_over_base": memory / base},
        {
            "total_bytes_over_base": sum(weights.values()) / base,
            "resident_bytes_over_base": (memory + model.resident_bytes) / base,
        },
    )


def base_system(scorer: Scorer, tasks: Tasks, base: str) -> SystemResult:
    """Score the base alone.

    Raises:
        MediatorError: see `Scorer.score`.
    """
    return SystemResult(BASE, scorer.alike(BASE, tasks, checkpoint(base)), _models(1))


def expert_systems(
    scorer: Scorer, tasks: Tasks, experts: Mapping[str, str], each: bool
) -> list[SystemResult]:
    """Score each task's fine-tune, and, if `each`, every fine-tune on all tasks.

    Raises:
        MediatorError: see `Scorer.score`.
    """
    answering = {name: [checkpoint(experts[name])] * len(t.examples) for name, t in tasks.items()}
    scores = scorer.score(EXPERTS, tasks, answering)
    results = [SystemResult(EXPERTS, scores, _models(len(experts)))]
    for name, source in experts.items() if each else ():
        scores = scorer.alike(f"expert {name}", tasks, checkpoint(source))
        results.append(SystemResult(f"expert {name}", scores, _models(1)))
    return results


def base_bytes(model: MediatorModel) -> int:
    """Count the bytes of the base's weight files."""
    return sum(digest.bytes for digest in model.manifest.base.files.values())


def compare(model: MediatorModel, tasks: Tasks, base: Any) -> dict[str, Any]:
    """Score the base and an artifact on tasks.

    Args:
        model: the artifact.
        tasks: the tasks, by the name of their expert.
        base: the base, as a causal language model.

    Returns:
        `systems`: by system and task, `accuracy`, `answer_log_likelihood` (nats per token) and `n`;
        `routing`: by task, the number of examples by their likeliest expert, and the mean entropy in nats.

    Raises:
        TaskError: a task has not the name of an expert.
    """
    scorer = Scorer(model.tokenizer, quiet=True)
    routing = route(model, tasks)
    contender = Contender(BASE, lambda *_: nullcontext(base))
    systems = {BASE: scorer.alike(BASE, tasks, contender)}
    for result in mediator_systems(model, scorer, tasks, routing):
        systems[result.name] = dict(result.scores)
    return {
        "systems": {
            system: {name: vars(score) for name, score in scores.items()}
            for system, scores in systems.items()
        },
        "routing": {name: routed.figures(model.experts) for name, routed in routing.items()},
    }


def _models(count: int) -> dict[str, float]:
    """Make the figures of size of so many whole models."""
    return {
        "total_bytes_over_base": float(count),
        "resident_bytes_over_base": float(count),
    }


def _route(model: MediatorModel, examples: Sequence[Example], batch_size: int = 8) -> Routing:
    mixtures: list[Mixture] = []
    likeliest: list[str] = []
    confidence: list[float] = []
    entropy = 0.0
    for start in range(0, len(examples), batch_size):
        prompts = [render(model.tokenizer, e.prompt) for e in examples[start : start + batch_size]]
        decision = model.route(*model.pad(prompts))
        entropy += float(decision.entropy.sum())
        most, choice = decision.weights.max(dim=1)
        likeliest += [model.experts[i] for i in choice.tolist()]
        confidence += most.tolist()
        rows = model.mixtures(decision).tolist()
        mixtures += [Mixture.of_row(row, model.experts) for row in rows]
    mean_entropy = entropy / len(examples)
    return Routing(tuple(mixtures), tuple(likeliest), tuple(confidence), mean_entropy)
