"""Scores an artifact on the tasks of its experts: dense, with each task's own expert, and routed."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from mergekit_mediator.errors import TaskError
from mergekit_mediator.evaluate.contenders import Contender, checkpoint, mixed
from mergekit_mediator.evaluate.results import SystemResult
from mergekit_mediator.evaluate.scorer import Scorer, Tasks
from mergekit_mediator.evaluate.tasks import Example
from mergekit_mediator.models.prompts import render
from mergekit_mediator.serve.mixture import Mixture
from mergekit_mediator.serve.model import MediatorModel

# Ratios to the base: of the dense expert alone, and of everything.
Sizes = tuple[dict[str, float], dict[str, float]]


@dataclass(frozen=True)
class Routing:
    """Where an artifact's router and policy send the examples of a task.

    mixtures: of each example.
    likeliest: expert of each example.
    entropy: mean over the examples, in nats.
    """

    mixtures: tuple[Mixture, ...]
    likeliest: tuple[str, ...]
    entropy: float

    def figures(self, experts: Sequence[str]) -> dict[str, Any]:
        """`chosen`: how many examples had each expert as their likeliest; `entropy`."""
        chosen = {expert: self.likeliest.count(expert) for expert in experts}
        return {"chosen": chosen, "entropy": self.entropy}


def route(model: MediatorModel, tasks: Tasks) -> dict[str, Routing]:
    """Route every example by its prompt alone.

    Raises:
        TaskError: a task that is named after no expert, or an artifact without a tokenizer.
    """
    if model.tokenizer is None:
        raise TaskError(f"{model.root}: has no tokenizer, without which no task can be read")
    for name in tasks:
        if name not in model.experts:
            raise TaskError(
                f"task {name!r} is no expert's: name it after {', '.join(model.experts)}"
            )
    return {name: _route(model, task.examples) for name, task in tasks.items()}


def routing_accuracy(routing: Mapping[str, Routing]) -> float:
    """The share of examples whose likeliest expert is that of their task."""
    right = [expert == task for task, found in routing.items() for expert in found.likeliest]
    return sum(right) / len(right)


def mediator_systems(
    model: MediatorModel,
    scorer: Scorer,
    tasks: Tasks,
    routing: Mapping[str, Routing] | None = None,
    stored: Sizes | None = None,
) -> list[SystemResult]:
    """An artifact without experts, with each task's own, and routed; the figures are ratios to the base.

    Args:
        model: the artifact.
        scorer: of everything.
        tasks: by the name of the expert that they belong to.
        routing: of the artifact on the tasks, if it is known.
        stored: the sizes of the artifact as it is stored, if the model is not in that dtype.

    Raises:
        MediatorError: see `Scorer.score`.
    """
    routing = routing if routing is not None else route(model, tasks)
    alone, figures = stored if stored is not None else sizes(model)
    own = {name: [mixed(model, {name: 1.0})] * len(t.examples) for name, t in tasks.items()}
    routed = {name: [mixed(model, m) for m in r.mixtures] for name, r in routing.items()}
    return [
        SystemResult(
            "mediator_dense",
            scorer.alike("mediator_dense", tasks, mixed(model, {})),
            alone,
        ),
        SystemResult("mediator_oracle", scorer.score("mediator_oracle", tasks, own), figures),
        SystemResult(
            "mediator",
            scorer.score("mediator", tasks, routed),
            {**figures, "routing_accuracy": routing_accuracy(routing)},
        ),
    ]


def sizes(model: MediatorModel) -> Sizes:
    """Bytes of weights and routers, stored and in memory, over those of the base's weights.

    Gives those of the dense expert alone, and those of everything with all experts decoded.
    """
    base = base_bytes(model)
    dense = sum(p.numel() * p.element_size() for p in model.model.parameters())
    for name in model.experts:
        with model.mixture({name: 1.0}):
            pass  # an expert is decoded when it is first used, and counts as resident from then on
    weights = {path: f.bytes for path, f in model.manifest.files.items() if ".safetensors" in path}
    alone = sum(size for path, size in weights.items() if "/" not in path)
    return (
        {"total_bytes_over_base": alone / base, "resident_bytes_over_base": dense / base},
        {
            "total_bytes_over_base": sum(weights.values()) / base,
            "resident_bytes_over_base": (dense + model.resident_bytes) / base,
        },
    )


def base_system(scorer: Scorer, tasks: Tasks, base: str) -> SystemResult:
    """The base alone.

    Raises:
        MediatorError: see `Scorer.score`.
    """
    one = {"total_bytes_over_base": 1.0, "resident_bytes_over_base": 1.0}
    return SystemResult("base", scorer.alike("base", tasks, checkpoint(base)), one)


def expert_systems(
    scorer: Scorer, tasks: Tasks, experts: Mapping[str, str], each: bool
) -> list[SystemResult]:
    """Each task's own expert, and, if `each`, every expert on all tasks.

    Raises:
        MediatorError: see `Scorer.score`.
    """
    one = {"total_bytes_over_base": 1.0, "resident_bytes_over_base": 1.0}
    own = {name: [checkpoint(experts[name])] * len(t.examples) for name, t in tasks.items()}
    scores = scorer.score("experts", tasks, own)
    results = [SystemResult("experts", scores, dict.fromkeys(one, float(len(experts))))]
    for name, source in experts.items() if each else ():
        found = scorer.alike(f"expert {name}", tasks, checkpoint(source))
        results.append(SystemResult(f"expert {name}", found, one))
    return results


def base_bytes(model: MediatorModel) -> int:
    """The size of the base's weight files."""
    return sum(digest.bytes for digest in model.manifest.base.files.values())


def compare(model: MediatorModel, tasks: Tasks, base: Any = None) -> dict[str, Any]:
    """Score systems on tasks.

    Args:
        model: the artifact.
        tasks: by the name of the expert that they belong to.
        base: another causal language model to score, such as the base.

    Returns:
        `systems`: by system and task, `accuracy` and `answer_log_likelihood` (nats per token);
        `routing`: by task, how often each expert was the likeliest, and the mean entropy in nats.

    Raises:
        TaskError: a task that is named after no expert.
    """
    scorer = Scorer(model.tokenizer, quiet=True)
    routing = route(model, tasks)
    results = mediator_systems(model, scorer, tasks, routing)
    systems = {result.name: result.scores for result in results}
    named = {
        "dense expert": systems["mediator_dense"],
        "own expert": systems["mediator_oracle"],
        "routed": systems["mediator"],
    }
    if base is not None:
        contender = Contender("base", lambda *_: nullcontext(base))
        named = {"base": scorer.alike("base", tasks, contender), **named}
    return {
        "systems": {
            system: {name: vars(score) for name, score in scores.items()}
            for system, scores in named.items()
        },
        "routing": {name: found.figures(model.experts) for name, found in routing.items()},
    }


def _route(model: MediatorModel, examples: Sequence[Example], batch_size: int = 8) -> Routing:
    mixtures: list[Mixture] = []
    likeliest: list[str] = []
    entropy = 0.0
    for start in range(0, len(examples), batch_size):
        prompts = [render(model.tokenizer, e.prompt) for e in examples[start : start + batch_size]]
        decision = model.route(*model.pad(prompts))
        entropy += float(decision.entropy.sum())
        likeliest += [model.experts[i] for i in decision.weights.argmax(dim=1).tolist()]
        rows = model.mixtures(decision).tolist()
        mixtures += [Mixture.of_row(row, model.experts) for row in rows]
    return Routing(tuple(mixtures), tuple(likeliest), entropy / len(examples))
