"""Score the rivals of an artifact: static merges with tuned coefficients, and routed low-rank experts."""

from collections.abc import Mapping, Sequence

from mergekit_mediator.evaluate import rivals
from mergekit_mediator.evaluate.contenders import adapted, checkpoint, weight_bytes
from mergekit_mediator.evaluate.results import BEST_STATIC, Score, SystemResult, normalized
from mergekit_mediator.evaluate.rivals import Rivals
from mergekit_mediator.evaluate.scorer import Scorer, Tasks
from mergekit_mediator.evaluate.systems import Routing, routing_accuracy

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
            tuning: other examples of the same tasks; coefficients are chosen on them.
            routing: the artifact's routing of each task, which routed rivals share.
            base_bytes: the bytes of the base's weight files.
        """
        self._maker, self._scorer, self._base_bytes = maker, scorer, base_bytes
        self._tasks, self._tuning, self._routing = tasks, tuning, routing

    def score(self, names: Sequence[str], ranks: Sequence[int]) -> list[SystemResult]:
        """Score the rivals of some names; low-rank experts are scored at each rank.

        Raises:
            MediatorError: a rival cannot be made or scored.
        """
        static = [name for name in names if name in rivals.STATIC]
        results = self._static(static) if static else []
        if rivals.EXTRACTED in names:
            results += self._low_rank(rivals.EXTRACTED, self._maker.base, 0.0, ranks)
        if rivals.TWIN in names:
            coefficients = rivals.STATIC[rivals.AVERAGE][1][0]
            average, seconds = self._maker.static(rivals.AVERAGE, coefficients)
            results += self._low_rank(rivals.TWIN, str(average), seconds, ranks)
        if rivals.BY_ROUTER in names:
            contenders = {name: checkpoint(source) for name, source in self._maker.experts.items()}
            answering = {t: [contenders[e] for e in r.likeliest] for t, r in self._routing.items()}
            scores = self._scorer.score(_BEST_BY_ROUTER, self._tasks, answering)
            figures = self._routed_figures(float(len(contenders)))
            results.append(SystemResult(_BEST_BY_ROUTER, scores, figures))
        return results

    def _static(self, methods: Sequence[str]) -> list[SystemResult]:
        """Score each method with the coefficients that are best on the tuning examples; add the best method."""
        answering = {
            name: [checkpoint(self._maker.experts[name])] * len(task.examples)
            for name, task in self._tuning.items()
        }
        experts = self._scorer.score("experts, tuning", self._tuning, answering)
        results = []
        for method in methods:
            trials = []
            for coefficients in rivals.STATIC[method][1]:
                label = rivals.described(method, coefficients)
                folder, seconds = self._maker.static(method, coefficients)
                scores = self._scorer.alike(f"{label}, tuning", self._tuning, checkpoint(folder))
                trials.append((_tuning_score(scores, experts), label, folder, seconds))
            best_score, label, folder, seconds = max(trials)
            size = weight_bytes(folder) / self._base_bytes
            figures = {
                "total_bytes_over_base": size,
                "resident_bytes_over_base": size,
                "merge_cpu_seconds": seconds,
                "coefficients": label,
                "tuning_mean": best_score,
                "tried": len(trials),
            }
            scores = self._scorer.alike(label, self._tasks, checkpoint(folder))
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
