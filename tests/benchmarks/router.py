"""Which router: accuracy, calibration, out of distribution and time, on reasoning-gym prompts.

    python tests/benchmarks/router.py BASE_DIR [--adapters DIR]

BASE_DIR is the model that the experts come from and stands for the dense expert. `easy` are four
tasks in their own wording; `hard` are 25 tasks, calibrated on four wordings each and tested on two
others (`new`) and on the same four (`familiar`). DIR holds a LoRA adapter for each easy task: with
it the routers that need no data are measured too, on a dense expert that is the experts' mean.
"""

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import record
import router_dataless
import router_plots
import router_prompts as prompts
import torch
from router_features import Model
from router_systems import systems
from torch import Tensor

from mergekit_mediator.calibrated import CalibratedRouter, mean_embedding
from mergekit_mediator.calibration_data import embedding_features, shared_tokens
from mergekit_mediator.fit_router import Calibration, add, expected_calibration_error, fit, remove

CALIBRATION_SEED, REPORT_SEED = 11, 7
PER_EXPERT = 20
Rows = dict[str, list[list[int]]]


def auroc(near: Tensor, far: Tensor) -> float:
    """Probability that a far one scores higher than a near one, ties counting half."""
    difference = far[None].double() - near[:, None].double()
    return float(((difference > 0).double() + (difference == 0).double() / 2).mean())


def truths(groups: Mapping[str, Any]) -> Tensor:
    return torch.repeat_interleave(torch.tensor([len(rows) for rows in groups.values()]))


def judge(
    router: CalibratedRouter, known: Tensor, truth: Tensor, away: Mapping[str, Tensor]
) -> dict[str, float]:
    """Accuracy, calibration and distance of one router on one set of known prompts."""
    decision = router.decide(known)
    threshold = router.numbers["ood_threshold"]
    figures = {
        "accuracy": float((decision.weights.argmax(dim=1) == truth).double().mean()),
        "ece": expected_calibration_error(decision.weights, truth),
        "flagged": float((decision.ood > threshold).double().mean()),
    }
    for name, features in away.items():
        ood = router.decide(features).ood
        figures[f"ood_{name}_auroc"] = auroc(decision.ood, ood)
        figures[f"ood_{name}_flagged"] = float((ood > threshold).double().mean())
    return figures


class Bench:
    """One model's features of every set of prompts, made once."""

    def __init__(self, model: Model) -> None:
        self.model = model
        ways, others = prompts.FOR_CALIBRATION, prompts.FOR_REPORT
        self.sets: dict[str, Rows] = {
            "easy train": self.rows(prompts.easy(PER_EXPERT, CALIBRATION_SEED)),
            "easy test": self.rows(prompts.easy(50, REPORT_SEED)),
            "hard train": self.rows(prompts.hard(PER_EXPERT, CALIBRATION_SEED, ways)),
            "hard new": self.rows(prompts.hard(8, REPORT_SEED, others)),
            "hard familiar": self.rows(prompts.hard(8, REPORT_SEED, ways)),
            "near": {"near": [model.ids(p) for p in prompts.near(4, REPORT_SEED)]},
            "far": {"far": [model.ids(p) for p in prompts.far(60, REPORT_SEED)]},
        }

    def rows(self, texts: Mapping[str, list[str]]) -> Rows:
        return {task: [self.model.ids(p) for p in ps] for task, ps in texts.items()}

    def features(self, kind: str, level: str) -> tuple[dict[str, dict[str, Tensor]], Tensor]:
        """By set, features by task; and the tokens that mean embeddings leave out."""
        wanted = {k: v for k, v in self.sets.items() if k.startswith(level) or k in ("near", "far")}
        excluded = shared_tokens(self.sets[f"{level} train"])
        if kind == "embedding":
            table = self.model.table
            return {k: embedding_features(v, table, excluded) for k, v in wanted.items()}, excluded
        every = [row for groups in wanted.values() for rows in groups.values() for row in rows]
        states = iter(self.model.hidden(every))
        made = {
            k: {t: torch.stack([next(states) for _ in rows]) for t, rows in groups.items()}
            for k, groups in wanted.items()
        }
        return made, torch.zeros(0, dtype=torch.int64)

    def level(self, kind: Any, level: str, heads: tuple[Any, ...]) -> tuple[dict[str, Any], Any]:
        """Every head on one level of difficulty, and the first head's calibration and decisions."""
        made, excluded = self.features(kind, level)
        away = {k: torch.cat(list(made[k].values())) for k in ("near", "far")}
        tests = [k for k in made if k.startswith(level) and not k.endswith("train")]
        layer = None if kind == "embedding" else self.model.layer
        figures: dict[str, Any] = {}
        kept: tuple[Calibration, dict[str, tuple[Tensor, Tensor]]] | None = None
        for head in heads:
            began = time.perf_counter()
            calibration = fit(
                made[f"{level} train"], kind, head=head, layer=layer, excluded=excluded
            )
            figures[head] = {"fit_seconds": time.perf_counter() - began}
            figures[head]["held_out"] = {k: calibration.figures[k] for k in ("accuracy", "ece")}
            for name in tests:
                known, truth = torch.cat(list(made[name].values())), truths(made[name])
                figures[head][name] = judge(calibration.router, known, truth, away)
            if kept is None:
                decisions = {
                    name: (
                        calibration.router.decide(torch.cat(list(made[name].values()))).weights,
                        truths(made[name]),
                    )
                    for name in tests
                }
                kept = calibration, decisions
        return figures, kept

    def others(self, level: str) -> dict[str, Any]:
        """Other ways to route, on mean embeddings or tokens."""
        made, _ = self.features("embedding", level)
        flat = {k: [row for rows in v.values() for row in rows] for k, v in self.sets.items()}
        train = f"{level} train"
        known = systems(flat[train], torch.cat(list(made[train].values())), truths(made[train]))
        tests = [k for k in made if k.startswith(level) and k != train]
        return {
            name: {
                k: float(
                    (predict(flat[k], torch.cat(list(made[k].values()))) == truths(made[k]))
                    .double()
                    .mean()
                )
                for k in tests
            }
            for name, predict in known.items()
        }

    def more_prompts(self) -> dict[str, float]:
        """Accuracy on new wordings of `embedding` by prompts per expert."""
        result = {}
        for count in (8, 20, 40, 80):
            rows = self.rows(prompts.hard(count, CALIBRATION_SEED, prompts.FOR_CALIBRATION))
            excluded = shared_tokens(rows)
            router = fit(embedding_features(rows, self.model.table, excluded), "embedding").router
            test = embedding_features(self.sets["hard new"], self.model.table, excluded)
            choice = router.decide(torch.cat(list(test.values()))).weights.argmax(dim=1)
            result[str(count)] = float((choice == truths(test)).double().mean())
        return result

    def many(self) -> dict[str, Any]:
        """Up to 64 experts, one task each in its own wording: accuracy, adding, removing, time."""
        train = self.rows(
            {t: prompts.questions(t, PER_EXPERT, CALIBRATION_SEED) for t in prompts.MANY}
        )
        test = self.rows({t: prompts.questions(t, 10, REPORT_SEED) for t in prompts.MANY})
        excluded = shared_tokens(train)
        table = self.model.table
        known = embedding_features(train, table, excluded)
        asked = embedding_features(test, table, excluded)
        result: dict[str, Any] = {"by_experts": {}}
        for count in (4, 16, 64):
            some = dict(list(known.items())[:count])
            began = time.perf_counter()
            router = fit(some, "embedding", excluded=excluded).router
            seconds = time.perf_counter() - began
            x = torch.cat([asked[t] for t in some])
            right = router.decide(x).weights.argmax(dim=1) == truths({t: asked[t] for t in some})
            result["by_experts"][str(count)] = {
                "accuracy": float(right.double().mean()),
                "fit_seconds": seconds,
                **decide_ms(router, next(iter(test.values())), table),
            }
        last = prompts.MANY[63]
        without = remove(router, last).router
        again = add(without, last, known[last]).router
        result["adding_back_is_exact"] = torch.equal(again.weight, router.weight)
        result["others_untouched"] = all(
            torch.equal(without.features[t], router.features[t]) for t in without.experts
        )
        return result


def decide_ms(
    router: CalibratedRouter, rows: list[list[int]], table: Tensor, repeats: int = 400
) -> dict[str, float]:
    """Milliseconds from token ids to a decision, one request at a time."""
    ids = [torch.tensor([row]) for row in rows]
    times = []
    for i in range(repeats):
        row = ids[i % len(ids)]
        began = time.perf_counter()
        router.decide(mean_embedding(row, torch.ones_like(row), table, router.excluded))
        times.append(1000 * (time.perf_counter() - began))
    ordered = sorted(times[20:])
    return {"median_ms": ordered[len(ordered) // 2], "p99_ms": ordered[int(0.99 * len(ordered))]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path)
    parser.add_argument("--adapters", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = Model(arguments.base)
    bench = Bench(model)
    heads = ("ridge", "mahalanobis", "prototype")
    routers: dict[str, Any] = {}
    for kind in ("embedding", "hidden"):
        routers[kind] = {}
        for level in ("easy", "hard"):
            routers[kind][level], kept = bench.level(kind, level, heads)
            print(kind, level, json.dumps(routers[kind][level]["ridge"]), flush=True)
    calibration, decisions = kept
    timed = fit(bench.features("embedding", "hard")[0]["hard train"], "embedding").router
    time_embedding = decide_ms(
        timed, [r for g in bench.sets["hard new"].values() for r in g], model.table
    )
    rows = [group[0] for group in bench.sets["hard new"].values()]
    model.prefill_ms(rows[:3], partial=False)
    whole, part = (sorted(model.prefill_ms(rows, p))[len(rows) // 2] for p in (False, True))
    x = torch.zeros(1, calibration.router.weight.shape[1])
    began = time.perf_counter()
    for _ in range(100):
        calibration.router.decide(x)
    head_ms = 10 * (time.perf_counter() - began)
    hard = routers["hidden"]["hard"]["ridge"]["hard new"]
    figures: dict[str, Any] = {
        "default": "hidden with a ridge head",
        "easy_accuracy": routers["hidden"]["easy"]["ridge"]["easy test"]["accuracy"],
        "hard_accuracy": hard["accuracy"],
        "ece": hard["ece"],
        "ood_far_auroc": hard["ood_far_auroc"],
        "ood_near_auroc": hard["ood_near_auroc"],
        "p99_ms": time_embedding["p99_ms"],
        "p99_ms_of": "embedding, token ids to decision, one request",
        "hidden_over_prefill": (part + head_ms) / whole,
        "prompts_per_expert": PER_EXPERT,
        "calibrated": routers,
        "others": {level: bench.others(level) for level in ("easy", "hard")},
        "embedding_hard_new_accuracy_by_prompts": bench.more_prompts(),
        "time": {
            "embedding": time_embedding,
            "prefill_ms": whole,
            "prefill_to_layer_ms": part,
            "hidden_head_ms": head_ms,
        },
        "many": bench.many(),
    }
    if arguments.adapters:
        easy = prompts.easy(25, REPORT_SEED)
        away = {"near": prompts.near(2, REPORT_SEED), "far": prompts.far(30, REPORT_SEED)}
        figures["no_data"] = router_dataless.measure(arguments.base, arguments.adapters, easy, away)
    path = record.write("router", figures, {"calibration": CALIBRATION_SEED, "report": REPORT_SEED})
    new, truth = decisions["hard new"]
    matrix = torch.zeros(len(bench.sets["hard new"]), len(bench.sets["hard new"]))
    matrix.index_put_((truth, new.argmax(dim=1)), torch.tensor(1.0), accumulate=True)
    names = list(bench.sets["hard new"])
    router_plots.confusion(matrix, names, path.with_name("router-confusion.png"))
    labels = {
        "familiar wordings": decisions["hard familiar"],
        "new wordings": decisions["hard new"],
    }
    router_plots.reliability(labels, path.with_name("router-reliability.png"))


if __name__ == "__main__":
    main()
