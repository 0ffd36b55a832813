"""Scores the rivals of an artifact: static merges with tuned coefficients, and low-rank experts routed alike."""

from collections.abc import Mapping, Sequence

from mergekit_mediator.evaluate import rivals
from mergekit_mediator.evaluate.contenders import adapted, checkpoint, weight_bytes
from mergekit_mediator.evaluate.results import Score, SystemResult, normalized
from mergekit_mediator.evaluate.rivals import Rivals
from mergekit_mediator.evaluate.scorer import Scorer, Tasks
from mergekit_mediator.evaluate.systems import Routing, routing_accuracy


class RivalSystems:
    """Rivals of one artifact, on its tasks."""

    def __init__(
        self,
        made: Rivals,
        scorer: Scorer,
        tasks: Tasks,
        tuning: Tasks,
        routing: Mapping[str, Routing],
        base_bytes: int,
    ) -> None:
        """
        Args:
            made: where rivals come from.
            scorer: of everything.
            tasks: what is reported.
            tuning: other examples of the same tasks, which coefficients are chosen on.
            routing: of the artifact, which rivals that are routed share.
            base_bytes: of one model.
        """
        self._made, self._scorer, self._base_bytes = made, scorer, base_bytes
        self._tasks, self._tuning, self._routing = tasks, tuning, routing

    def score(self, names: Sequence[str], ranks: Sequence[int]) -> list[SystemResult]:
        """The rivals of these names; low-rank experts at each of the ranks.

        Raises:
            MediatorError: a rival that cannot be made or scored.
        """
        static = [name for name in names if name in rivals.STATIC]
        results = self._static(static) if static else []
        if rivals.EXTRACTED in names:
            results += self._low_rank(rivals.EXTRACTED, self._made.base, 0.0, ranks)
        if rivals.TWIN in names:
            average, seconds = self._made.static(rivals.AVERAGE, self._coefficients(rivals.AVERAGE))
            results += self._low_rank(rivals.TWIN, str(average), seconds, ranks)
        if rivals.BY_ROUTER in names:
            sources = {name: checkpoint(source) for name, source in self._made.experts.items()}
            routed = {t: [sources[e] for e in r.likeliest] for t, r in self._routing.items()}
            scores = self._scorer.score("best_expert_by_router", self._tasks, routed)
            size = float(len(sources))
            results.append(SystemResult("best_expert_by_router", scores, self._routed(size)))
        return results

    def _static(self, methods: Sequence[str]) -> list[SystemResult]:
        """Each method with the coefficients that are best on the tuning examples; and the best method."""
        own = {
            name: [checkpoint(self._made.experts[name])] * len(task.examples)
            for name, task in self._tuning.items()
        }
        experts = self._scorer.score("experts, tuning", self._tuning, own)
        results = []
        for method in methods:
            tried = []
            for coefficients in rivals.STATIC[method][1]:
                label = rivals.described(method, coefficients)
                folder, seconds = self._made.static(method, coefficients)
                found = self._scorer.alike(f"{label}, tuning", self._tuning, checkpoint(folder))
                tried.append((_mean(found, experts), label, folder, seconds))
            mean, label, folder, seconds = max(tried)
            size = weight_bytes(folder) / self._base_bytes
            figures = {
                "total_bytes_over_base": size,
                "resident_bytes_over_base": size,
                "merge_cpu_seconds": seconds,
                "coefficients": label,
                "tuning_mean": mean,
                "tried": len(tried),
            }
            scores = self._scorer.alike(label, self._tasks, checkpoint(folder))
            results.append(SystemResult(method, scores, figures))
        best = max(results, key=lambda result: float(result.figures["tuning_mean"]))
        return [*results, SystemResult("best_static", best.scores, best.figures)]

    def _low_rank(
        self, name: str, reference: str, seconds: float, ranks: Sequence[int]
    ) -> list[SystemResult]:
        """Experts as a reference plus an extracted adapter each; one extraction serves all ranks."""
        largest = max(ranks)
        adapters = {}
        for expert in self._made.experts:
            adapters[expert], taken = self._made.adapter(expert, reference, largest, name)
            seconds += taken
        results = []
        for rank in sorted(set(ranks)):
            cut = {
                expert: adapter if rank == largest else rivals.truncated(adapter, rank)
                for expert, adapter in adapters.items()
            }
            size = 1 + sum(map(weight_bytes, cut.values())) / self._base_bytes
            system = f"{name} {rank}"
            sources = {expert: adapted(reference, adapter) for expert, adapter in cut.items()}
            routed = {t: [sources[e] for e in r.likeliest] for t, r in self._routing.items()}
            scores = self._scorer.score(system, self._tasks, routed)
            figures = {**self._routed(size), "merge_cpu_seconds": seconds}
            results.append(SystemResult(system, scores, figures))
        return results

    def _coefficients(self, method: str) -> Mapping[str, float]:
        return rivals.STATIC[method][1][0]

    def _routed(self, size: float) -> dict[str, float]:
        return {
            "total_bytes_over_base": size,
            "resident_bytes_over_base": size,
            "routing_accuracy": routing_accuracy(self._routing),
        }


def _mean(scores: Mapping[str, Score], experts: Mapping[str, Score]) -> float:
    """What coefficients are chosen by: the normalised mean; where an expert answers nothing, likelihood."""
    if all(expert.accuracy for expert in experts.values()):
        return normalized(scores, experts)[0]
    return sum(score.answer_log_likelihood for score in scores.values()) / len(scores)
