"""Which way of merging keeps every specialist, at which size?

    python tests/benchmarks/train_experts.py --family strong4 --out experts
    python tests/benchmarks/experts.py --family strong4 --experts experts

Scores every system on every expert's task and writes results/experts-N.json. Static merges are
tried with several coefficients on prompts of another seed, and the best of each method is scored
on the prompts of the report. Scores and merges in the work folder are kept and used again; remove
it after a change of the method.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import record
import torch
from baselines import LowRank, State, average, load, merge, size, static_configs
from bench import Bench, Mixture, Routes
from train_experts import FAMILIES, RECIPES, REPORT_SEED

from mergekit_mediator import MediatorModel
from mergekit_mediator.results import (
    Score,
    SystemResult,
    normalized,
    recovered,
    to_json,
    to_markdown,
)
from mergekit_mediator.tasks import from_reasoning_gym

RANKS = (4, 16)
TUNE_SEED, TUNE_PROMPTS = 8, 16
MEDIATORS = ("mediator", "mediator_exact", "mediator_sign", "mediator_defaults")
GROUPS = (*MEDIATORS, "static", "low_rank")


def parameters(name: str, count: int) -> dict[str, Any]:
    """The parameters of one of `MEDIATORS` for so many experts."""
    return {
        "mediator": {"budget": "1.06x" if count <= 4 else "1.10x"},
        "mediator_exact": {"route": "all", "density": 0.1, "values": "exact"},
        "mediator_sign": {"route": "all", "density": 1.0, "values": "sign"},
        "mediator_defaults": {},
    }[name]


def static_results(
    bench: Bench, base: Path, folders: dict[str, Path], prompts: int, experts: dict[str, Score]
) -> list[SystemResult]:
    """The best coefficients of every static method, chosen on the tuning seed, then reported."""
    tuned: dict[str, tuple[float, str, State]] = {}
    for name, (method, coefficients) in static_configs(len(folders)).items():
        config = {"merge_method": method, "parameters": coefficients}
        state = load(merge(config, base, folders, bench.work / "merges" / name.replace(" ", "-")))
        scores = bench.alike(name, TUNE_SEED, TUNE_PROMPTS, partial(bench.holding, state))
        mean = normalized(scores, experts)[0]
        if mean >= tuned.get(method, (-1.0, "", {}))[0]:
            tuned[method] = (mean, name, state)
    results = []
    for method, (mean, name, state) in tuned.items():
        scores = bench.alike(name, REPORT_SEED, prompts, partial(bench.holding, state))
        figures = {"total_bytes_over_base": 1.0, "coefficients": name, "tuning_mean": mean}
        results.append(SystemResult("average" if method == "linear" else method, scores, figures))
    best = max(results, key=lambda result: float(result.figures["tuning_mean"]))
    return [*results, SystemResult("best_static", best.scores, best.figures)]


def routes_of(mediator: MediatorModel, tasks: list[str], prompts: int) -> Routes:
    """What the artifact's own router and policy give every prompt of the report."""
    routes: Routes = {}
    for task in tasks:
        examples = from_reasoning_gym(task, prompts, REPORT_SEED, RECIPES[task].config).examples
        texts = [str(example.prompt) for example in examples]
        routes[task] = []
        for start in range(0, prompts, 8):
            decision = mediator.route(texts[start : start + 8])
            weights = mediator.mixtures(decision)
            routes[task] += [
                tuple((e, p) for e, p in zip(decision.experts, row, strict=True) if p > 0)
                for row in weights.tolist()
            ]
    return routes


def best_single(routes: Routes) -> Routes:
    """The likeliest expert alone, for systems that cannot mix."""
    return {
        task: [((max(mixture, key=lambda pair: pair[1])[0], 1.0),) for mixture in mixtures]
        for task, mixtures in routes.items()
    }


def routing_accuracy(routes: Routes) -> float:
    """Share of prompts whose likeliest expert is that of their task."""
    right = [
        mixture[0][0] == t for t, mixtures in best_single(routes).items() for mixture in mixtures
    ]
    return sum(right) / len(right)


def mediator_results(
    bench: Bench, name: str, folder: Path, oracle: Routes, base_bytes: int
) -> tuple[list[SystemResult], Routes]:
    """One artifact with perfect routing, with its own, and with none."""
    mediator = MediatorModel.from_pretrained(folder)
    prompts = len(next(iter(oracle.values())))
    stored = sum(
        entry.bytes for path, entry in mediator.manifest.files.items() if "safetensors" in path
    )
    figures = {
        "total_bytes_over_base": stored / base_bytes,
        "parameters": parameters(name, len(oracle)),
    }

    def mixed(mixture: Mixture) -> AbstractContextManager[Any]:
        return mediator.mixture(dict(mixture))

    pinned = bench.routed(name, REPORT_SEED, oracle, mixed)
    dense = bench.alike(f"{name} dense", REPORT_SEED, prompts, partial(mixed, ()))
    routes = routes_of(mediator, list(oracle), prompts)
    routed = bench.routed(name, REPORT_SEED, routes, mixed)
    routing = {"routing_accuracy": routing_accuracy(routes)}
    return [
        SystemResult(name, routed, figures | routing),
        SystemResult(f"{name}_oracle", pinned, figures),
        SystemResult(f"{name}_dense", dense, {"total_bytes_over_base": 1.0}),
    ], routes


def low_rank_results(
    bench: Bench, kind: str, experts: LowRank, oracle: Routes, routes: Routes, base_bytes: int
) -> list[SystemResult]:
    """Low-rank experts with perfect routing and with the same router as Mediator."""
    results = []
    for rank in RANKS:
        name = f"{kind}_{rank}"

        def loaded(mixture: Mixture, rank: int = rank) -> AbstractContextManager[Any]:
            return bench.holding(experts.state(mixture[0][0], rank))

        figures = {"total_bytes_over_base": 1 + experts.stored(rank) / base_bytes}
        for suffix, used in (("", best_single(routes)), ("_oracle", oracle)):
            scores = bench.routed(name, REPORT_SEED, used, loaded)
            results.append(SystemResult(name + suffix, scores, figures))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare ways of merging experts.")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="strong4")
    parser.add_argument(
        "--experts", type=Path, default=Path("experts"), help="train_experts' --out"
    )
    parser.add_argument("--base", type=Path, help="checkpoint directory of the base model")
    parser.add_argument("--work", type=Path, help="where merges and scores are kept")
    parser.add_argument("--prompts", type=int, default=64, help="prompts a task in the report")
    parser.add_argument("--only", choices=GROUPS, action="append", help="keep the other results")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tasks = FAMILIES[args.family]
    groups = args.only or GROUPS
    base = args.base or args.experts / "base"
    folders = {task: args.experts / task for task in tasks}
    bench = Bench(base, tasks, args.work or args.experts / "work" / args.family)
    start = load(base)
    states = {task: load(folder) for task, folder in folders.items()}
    oracle: Routes = {task: [((task, 1.0),)] * args.prompts for task in tasks}

    def expert(mixture: Mixture) -> AbstractContextManager[Any]:
        return bench.holding(states[mixture[0][0]])

    experts = bench.routed("expert", REPORT_SEED, oracle, expert)
    untrained = bench.alike("base", REPORT_SEED, args.prompts, partial(bench.holding, start))
    full = {"total_bytes_over_base": float(len(tasks))}
    results = [
        SystemResult("base", untrained, {"total_bytes_over_base": 1.0}),
        SystemResult("experts", experts, full),
    ]
    routes: Routes = oracle
    for name in MEDIATORS:
        if name in groups:
            config = {"merge_method": "mediator", "parameters": parameters(name, len(tasks))}
            folder = merge(config, base, folders, bench.work / "merges" / name)
            found, own = mediator_results(bench, name, folder, oracle, size(start))
            results += found
            routes = own if name == "mediator" else routes
    if "mediator" in groups:
        by_router = bench.routed("expert", REPORT_SEED, best_single(routes), expert)
        results.append(SystemResult("best_expert_by_router", by_router, full))
    if "static" in groups:
        results += static_results(bench, base, folders, args.prompts, experts)
    if "low_rank" in groups:
        references = {"extract_lora": start, "twin_merging": average(list(states.values()))}
        for kind, reference in references.items():
            low_rank = LowRank(reference, states)
            results += low_rank_results(bench, kind, low_rank, oracle, routes, size(start))
    rows = to_json(results, experts)
    for result in results:
        mean, worst = recovered(result.scores, untrained, experts)
        rows[result.name] |= {"recovered_mean": mean, "recovered_worst": worst}
    figures = {
        "family": {task: RECIPES[task].config for task in tasks},
        "prompts_per_task": args.prompts,
        "systems": rows,
    }
    name = f"experts-{len(tasks)}" if args.family != "overlap" else "experts-overlap"
    if args.only:
        figures["systems"] = record.read(name)["systems"] | rows
    path = record.write(name, figures, {"report": REPORT_SEED, "tune": TUNE_SEED})
    print(f"{to_markdown(results, experts)}\nwritten to {path}")


if __name__ == "__main__":
    main()
