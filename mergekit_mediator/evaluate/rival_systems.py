"""Score the rivals of an artifact: static merges with tuned coefficients, and routed low-rank experts."""

from collections.abc import Mapping, Sequence

import click

from mergekit_mediator.evaluate import rivals
from mergekit_mediator.evaluate.contenders import adapted, checkpoint, weight_bytes
from mergekit_mediator.evaluate.results import BEST_STATIC, Score, SystemResult, normalized
from mergekit_mediator.evaluate.rivals import Rivals
from mergekit_mediator.evaluate.scorer import Scorer, Tasks
from mergekit_mediator.evaluate.static_methods import STATIC
from mergekit_mediator.evaluate.systems import Routing, routing_accuracy
from mergekit_mediator.evaluate.trials import average, trials
from mergekit_mediator.models.prompt_files import MIN_PROMPTS

# The name of a system: all fine-tunes, of which the artifact's router chooses one.
_BEST_BY_ROUTER = "best_expert_by_router"


class RivalSystems:
    """The rivals of one artifact, scored on its tasks."""

    def __init__(
        self,
        maker: Rivals,
        scorer: Scorer,
        tasks: Tasks,
        tuning: Tasks,
        routing: Mapping[str, Routing],
        base_bytes: int,
    ) -> None:
        """Score nothing yet.

        Args:
            maker: makes the rivals.
            scorer: the scorer of all systems.
            tasks: the tasks; their scores are reported.
            tuning: other examples of the same tasks. Coefficients are chosen on them, and a method that needs prompts
                gets theirs.
            routing: the artifact's routing of each task, which routed rivals share.
            base_bytes: the bytes of the base's weight files.
        """
        self._maker, self._scorer, self._base_bytes = maker, scorer, base_bytes
        self._tasks, self._tuning, self._routing = tasks, tuning, routing
        # without answers, and none of them is reported
        self._prompts = {n: [e.prompt for e in task.examples] for n, task in tuning.items()}

    def score(self, names: Sequence[str], ranks: Sequence[int]) -> list[SystemResult]:
        """Score the rivals of some names; low-rank experts are scored at each rank.

        Raises:
            MediatorError: a rival cannot be made or scored.
        """
        static = [name for name in names if name in STATIC and self._can_be_made(name)]
        results = self._static(static) if static else []
        if rivals.EXTRACTED in names:
            results += self._low_rank(rivals.EXTRACTED, self._maker.base, 0.0, ranks)
        if rivals.TWIN in names:
            mean = average(self._maker)
            results += self._low_rank(rivals.TWIN, str(mean.folder), mean.seconds, ranks)
        if rivals.BY_ROUTER in names:
            contenders = {name: checkpoint(source) for name, source in self._maker.experts.items()}
            answering = {t: [contenders[e] for e in r.likeliest] for t, r in self._routing.items()}
            scores = self._scorer.score(_BEST_BY_ROUTER, self._tasks, answering)
            figures = self._routed_figures(float(len(contenders)))
            results.append(SystemResult(_BEST_BY_ROUTER, scores, figures))
        return results

    def _can_be_made(self, name: str) -> bool:
        """Tell whether every expert has the prompts that a rival needs, with a warning where one has not."""
        if not STATIC[name].needs_prompts:
            return True
        for expert in self._maker.experts:
            count = len(self._prompts.get(expert, ()))
            if count < MIN_PROMPTS:
                click.echo(
                    f"warning: rival {name} is left out: {MIN_PROMPTS} examples of every expert's task required "
                    f"to tune on, got {count} of {expert}: add them, or raise --tune",
                    err=True,
                )
                return False
        return True

    def _static(self, methods: Sequence[str]) -> list[SystemResult]:
        """Score each method with the coefficients that are best on the tuning examples; add the best method."""
        answering = {
            name: [checkpoint(self._maker.experts[name])] * len(task.examples)
            for name, task in self._tuning.items()
        }
        experts = self._scorer.score("experts, tuning", self._tuning, answering)
        results = []
        for method in methods:
            scored = []
            for trial in trials(self._maker, method, STATIC[method], self._prompts):
                scores = self._scorer.alike(
                    f"{trial.label}, tuning", self._tuning, checkpoint(trial.folder)
                )
                scored.append((_tuning_score(scores, experts), trial))
            best_score, chosen = max(scored, key=lambda one: one[0])
            size = weight_bytes(chosen.folder) / self._base_bytes
            figures = {
                "total_bytes_over_base": size,
                "resident_bytes_over_base": size,
                "merge_cpu_seconds": chosen.seconds,
                "coefficients": chosen.label,
                "tuning_mean": best_score,
                "tried": len(scored),
            }
            scores = self._scorer.alike(chosen.label, self._tasks, checkpoint(chosen.folder))
            results.append(SystemResult(method, scores, figures))
        best = max(results, key=lambda result: float(result.figures["tuning_mean"]))
        return [*results, SystemResult(BEST_STATIC, best.scores, best.figures)]

    def _low_rank(
        self, name: str, reference: str, seconds: float, ranks: Sequence[int]
    ) -> list[SystemResult]:
        """Score experts that are a reference plus an adapter each; one extraction serves all ranks.

        Args:
            name: the rival's name.
            reference: the model that adapters are extracted relative to.
            seconds: the CPU seconds that the reference took.
            ranks: the ranks of the adapters.
        """
        largest = max(ranks)
        adapters = {}
        for expert in self._maker.experts:
            adapters[expert], extraction = self._maker.adapter(expert, reference, largest, name)
            seconds += extraction
        results = []
        for rank in sorted(set(ranks)):
            folders = {
                expert: adapter if rank == largest else rivals.truncated(adapter, rank)
                for expert, adapter in adapters.items()
            }
            size = 1 + sum(map(weight_bytes, folders.values())) / self._base_bytes
            system = f"{name} {rank}"
            contenders = {expert: adapted(reference, folder) for expert, folder in folders.items()}
            answering = {t: [contenders[e] for e in r.likeliest] for t, r in self._routing.items()}
            scores = self._scorer.score(system, self._tasks, answering)
            figures = {**self._routed_figures(size), "merge_cpu_seconds": seconds}
            results.append(SystemResult(system, scores, figures))
        return results

    def _routed_figures(self, size: float) -> dict[str, float]:
        return {
            "total_bytes_over_base": size,
            "resident_bytes_over_base": size,
            "routing_accuracy": routing_accuracy(self._routing),
        }


def _tuning_score(scores: Mapping[str, Score], experts: Mapping[str, Score]) -> float:
    """Compute the score that chooses coefficients.

    It is the normalised mean, or the mean log-likelihood in nats if an expert answers nothing right.
    """
    if all(expert.accuracy for expert in experts.values()):
        return normalized(scores, experts)[0]
    return sum(score.answer_log_likelihood for score in scores.values()) / len(scores)
