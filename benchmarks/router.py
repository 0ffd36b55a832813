"""Which router: accuracy, calibration, out of distribution and time, on reasoning-gym prompts.

    python benchmarks/router.py BASE_DIR [--cache DIR]

BASE_DIR is the model that the experts come from and stands for the dense expert. `easy` are four
tasks in their own wording; `hard` are 25 tasks, calibrated on 20 prompts each in 16 wordings and
tested on ten others (`new`) and on the same ones (`familiar`). Everything that had to be chosen was chosen on the
tasks of router_development.py. router_dataless.py measures the routers that need no data.
"""

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import record
import router_plots
import router_prompts as prompts
import torch
from router_features import Features, Model, Rows
from router_systems import systems
from torch import Tensor

from mergekit_mediator.route.background import BACKGROUND
from mergekit_mediator.route.calibrated import CalibratedRouter, Head, Kind, standardized
from mergekit_mediator.route.confidence import expected_calibration_error
from mergekit_mediator.route.features import embedding_features, mean_embedding, shared_tokens
from mergekit_mediator.route.fit import Calibration, fit

# reasoning-gym draws problem i of seed s as problem i - 1 of seed s + 1: seeds must lie far apart
CALIBRATION_SEED, REPORT_SEED = 11, 100_007
PER_EXPERT = 20
WAYS = (1, 2, 4, 8, 16)
HEADS: tuple[Head, ...] = ("ridge", "mahalanobis", "prototype")


def auroc(near: Tensor, far: Tensor) -> float:
    """Probability that a far one scores higher than a near one, ties counting half."""
    difference = far[None].double() - near[:, None].double()
    return float(((difference > 0).double() + (difference == 0).double() / 2).mean())


def truths(groups: Mapping[str, Any]) -> Tensor:
    return torch.repeat_interleave(torch.tensor([len(rows) for rows in groups.values()]))


def together(groups: Features) -> Tensor:
    return torch.cat(list(groups.values()))


def judge(
    router: CalibratedRouter, known: Features, away: Mapping[str, Features]
) -> dict[str, float]:
    """Accuracy, calibration and distance of one router on one set of known prompts."""
    decision = router.decide(together(known))
    threshold = router.numbers["ood_threshold"]
    figures = {
        "accuracy": accuracy(decision.weights, known),
        "ece": expected_calibration_error(decision.weights, truths(known)),
        "confidence": float(decision.weights.max(dim=1).values.mean()),
        "flagged": float((decision.ood > threshold).double().mean()),
    }
    for name, features in away.items():
        ood = router.decide(together(features)).ood
        figures[f"ood_{name}_auroc"] = auroc(decision.ood, ood)
        figures[f"ood_{name}_flagged"] = float((ood > threshold).double().mean())
    return figures


def ece_if_calibrated(weights: Tensor, wording: Tensor, draws: int = 200) -> dict[str, float]:
    """The calibration error that a perfectly calibrated router of this confidence would be measured to have.

    The prompts of a wording are mostly right or wrong together, so that there is chance in the error.
    Mean and 95th percentile over draws in which a wording is right as often as its prompts' confidence says.

    Args:
        weights: `[n, n_experts]`.
        wording: `[n]` int64, from 0.
    """
    generator = torch.Generator().manual_seed(0)
    confidence, choice = weights.max(dim=1)
    other = (choice + 1) % weights.shape[1]
    errors = []
    for _ in range(draws):
        luck = torch.rand(int(wording.max()) + 1, generator=generator)[wording]
        truth = torch.where(luck < confidence, choice, other)
        errors.append(expected_calibration_error(weights, truth))
    errors.sort()
    return {"mean": sum(errors) / draws, "p95": errors[int(0.95 * draws)]}


def accuracy(scores: Tensor, groups: Mapping[str, Any]) -> float:
    return float((scores.argmax(dim=1) == truths(groups)).double().mean())


class Bench:
    """One model's features of every set of prompts."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.sets: dict[str, Rows] = {
            name: model.rows(texts)
            for name, texts in {
                "easy train": prompts.easy(PER_EXPERT, CALIBRATION_SEED),
                "easy test": prompts.easy(50, REPORT_SEED),
                "hard train": prompts.hard(PER_EXPERT, CALIBRATION_SEED, "calibration"),
                "hard new": prompts.hard(40, REPORT_SEED, "report"),
                "hard familiar": prompts.hard(16, REPORT_SEED, "calibration"),
                "near": {"near": prompts.near(6, REPORT_SEED)},
                "far": {"far": prompts.far(96, REPORT_SEED)},
                "background": {"background": list(BACKGROUND)},
            }.items()
        }

    def features(self, kind: Kind, level: str) -> tuple[dict[str, Features], Tensor]:
        """By set, features by task; and the tokens that the router keeps."""
        others = ("near", "far", "background")
        wanted = {k: v for k, v in self.sets.items() if k.startswith(level) or k in others}
        if kind == "embedding":
            excluded = shared_tokens(self.sets[f"{level} train"])
            table = self.model.table
            return {k: embedding_features(v, table, excluded) for k, v in wanted.items()}, excluded
        return {k: self.model.hidden(v) for k, v in wanted.items()}, self.model.summary

    def level(self, kind: Kind, level: str) -> tuple[dict[str, Any], Calibration]:
        """Every head on one level of difficulty, and the first head's calibration."""
        made, tokens = self.features(kind, level)
        away = {k: made[k] for k in ("near", "far")}
        layers = () if kind == "embedding" else self.model.layers
        figures: dict[str, Any] = {}
        calibrations = []
        for head in HEADS:
            began = time.perf_counter()
            result = fit(
                made[f"{level} train"],
                kind,
                head=head,
                layers=layers,
                tokens=tokens,
                background=together(made["background"]),
            )
            figures[head] = {"fit_seconds": time.perf_counter() - began}
            figures[head]["held_out"] = {k: result.figures[k] for k in ("accuracy", "ece")}
            for name in self.tests(level):
                figures[head][name] = judge(result.router, made[name], away)
            calibrations.append(result)
        return figures, calibrations[0]

    def tests(self, level: str) -> list[str]:
        return [k for k in self.sets if k.startswith(level) and not k.endswith("train")]

    def others(self, kind: Kind, level: str, router: CalibratedRouter) -> dict[str, Any]:
        """Other ways to route: on tokens, or on the features that `router` standardizes."""
        made, _ = self.features(kind, level)
        flat = {k: [row for rows in v.values() for row in rows] for k, v in self.sets.items()}

        def seen(name: str) -> Tensor:
            blocks = len(router.layers) or 1
            return standardized(together(made[name]), router.center, router.scale, blocks)

        train = f"{level} train"
        known = systems(flat[train], seen(train), truths(made[train]))
        return {
            name: {
                k: float((predict(flat[k], seen(k)) == truths(made[k])).double().mean())
                for k in self.tests(level)
            }
            for name, predict in known.items()
        }

    def more_prompts(self) -> dict[str, float]:
        """Accuracy on new wordings of `embedding` by prompts per expert."""
        result = {}
        for count in (8, 20, 40, 80):
            texts = prompts.hard(count, CALIBRATION_SEED, "calibration")
            rows = self.model.rows(texts)
            excluded = shared_tokens(rows)
            known = embedding_features(rows, self.model.table, excluded)
            router = fit(known, "embedding", tokens=excluded).router
            test = embedding_features(self.sets["hard new"], self.model.table, excluded)
            result[str(count)] = accuracy(router.decide(together(test)).weights, test)
        return result

    def fewer_wordings(self) -> dict[str, float]:
        """Accuracy on new wordings of `hidden` by how many ways the same number of prompts is worded in."""
        made, _ = self.features("hidden", "hard")
        result = {}
        for count in WAYS:
            texts = prompts.hard(PER_EXPERT, CALIBRATION_SEED, "calibration", count)
            router = fit(
                self.model.hidden(self.model.rows(texts)),
                "hidden",
                layers=self.model.layers,
                background=together(made["background"]),
            ).router
            new = made["hard new"]
            result[str(count)] = accuracy(router.decide(together(new)).weights, new)
        return result


def decide_ms(
    router: CalibratedRouter, rows: list[list[int]], table: Tensor, repeats: int = 400
) -> dict[str, float]:
    """Milliseconds from token ids to a decision by mean embeddings, one request at a time; `cpu` is
    the time of its thread, which other work on the machine does not lengthen by waiting."""
    ids = [torch.tensor([row]) for row in rows]
    times, cpu = [], []
    for i in range(repeats):
        row = ids[i % len(ids)]
        began, worked = time.perf_counter(), time.thread_time()
        router.decide(mean_embedding(row, torch.ones_like(row), table, router.tokens))
        times.append(1000 * (time.perf_counter() - began))
        cpu.append(1000 * (time.thread_time() - worked))
    return quantiles(times[20:]) | {f"cpu_{k}": v for k, v in quantiles(cpu[20:]).items()}


def quantiles(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {"median_ms": ordered[len(ordered) // 2], "p99_ms": ordered[int(0.99 * len(ordered))]}


def main() -> None:
    prompts.same_every_time()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path)
    parser.add_argument("--cache", type=Path, help="keeps hidden states, for the next time")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = Model(arguments.base, arguments.cache)
    bench = Bench(model)
    routers: dict[str, Any] = {"embedding": {}, "hidden": {}}
    fitted: dict[str, Calibration] = {}
    others: dict[str, Any] = {"embedding": {}, "hidden": {}}
    for kind in ("embedding", "hidden"):
        for level in ("easy", "hard"):
            routers[kind][level], fitted[kind] = bench.level(kind, level)
            others[kind][level] = bench.others(kind, level, fitted[kind].router)
            print(kind, level, json.dumps(routers[kind][level]["ridge"]), flush=True)
    asked = [row for group in bench.sets["hard new"].values() for row in group]
    embedding = decide_ms(fitted["embedding"].router, asked, model.table)
    some = asked[:: len(asked) // 100]
    model.milliseconds(fitted["hidden"].router, some[:3])
    prefills, decisions = model.milliseconds(fitted["hidden"].router, some)
    time_hidden, time_prefill = quantiles(decisions), quantiles(prefills)
    hard = routers["hidden"]["hard"]["ridge"]["hard new"]
    made, _ = bench.features("hidden", "hard")
    decided = {
        name: (fitted["hidden"].router.decide(together(made[k])).weights, truths(made[k]))
        for name, k in (("familiar wordings", "hard familiar"), ("new wordings", "hard new"))
    }
    new, truth = decided["new wordings"]
    ways = len(next(iter(prompts.WORDINGS.values()))["report"])
    wording = torch.arange(len(truth)) % ways + ways * truth
    figures: dict[str, Any] = {
        "default": "hidden with a ridge head",
        "easy_accuracy": routers["hidden"]["easy"]["ridge"]["easy test"]["accuracy"],
        "hard_accuracy": hard["accuracy"],
        "ece": hard["ece"],
        "ece_if_calibrated": ece_if_calibrated(new, wording),
        "ood_far_auroc": hard["ood_far_auroc"],
        "ood_near_auroc": hard["ood_near_auroc"],
        "p99_ms": embedding["cpu_p99_ms"],
        "p99_ms_of": "embedding, token ids to decision, one request, time of its thread",
        "hidden_over_prefill": time_hidden["median_ms"] / time_prefill["median_ms"],
        "hidden_over_prefill_p99": time_hidden["p99_ms"] / time_prefill["p99_ms"],
        "prompts_per_expert": PER_EXPERT,
        "reported_prompts": {
            k: len(truths(v))
            for k, v in bench.sets.items()
            if not k.endswith(("train", "background"))
        },
        "calibrated": routers,
        "others": others,
        "embedding_hard_new_accuracy_by_prompts": bench.more_prompts(),
        "hidden_hard_new_accuracy_by_wordings": bench.fewer_wordings(),
        "time": {"embedding": embedding, "prefill": time_prefill, "hidden": time_hidden},
    }
    path = record.write("router", figures, {"calibration": CALIBRATION_SEED, "report": REPORT_SEED})
    router_plots.reliability(decided, path.with_name("router-reliability.png"))
    names = list(bench.sets["hard new"])
    matrix = torch.zeros(len(names), len(names))
    matrix.index_put_((truth, new.argmax(dim=1)), torch.tensor(1.0), accumulate=True)
    router_plots.confusion(matrix, names, path.with_name("router-confusion.png"))


if __name__ == "__main__":
    main()
