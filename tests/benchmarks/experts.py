"""Which way of merging keeps every specialist, at which size?

    python tests/benchmarks/train_experts.py --family strong4 --out experts
    python tests/benchmarks/experts.py --family strong4 --experts experts

Scores every system on every expert's task and writes results/experts-N.json. Static merges are
tried with several coefficients on prompts of another seed, and the best of each method is scored
on the prompts of the report. Scores and merges in the work folder are kept and used again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import record
import torch
from baselines import State, remainders, size, static_configs, static_merge
from safetensors.torch import load_file
from train_experts import FAMILIES, RECIPES, REPORT_SEED, Pair, answer_logits, tokenised
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_mediator.results import (
    AnswerScore,
    Score,
    SystemResult,
    normalized,
    recovered,
    to_json,
    to_markdown,
)

RANKS = (8, 16, 32)
TUNE_SEED, TUNE_PROMPTS = 8, 24


@torch.inference_mode()
def score_packed(model: Any, pairs: list[Pair]) -> list[AnswerScore]:
    """What `evaluate.score_answers` gives, three times faster on prompts that begin alike."""
    answers = []
    for start in range(0, len(pairs), 8):
        logits, targets, rows = answer_logits(model, pairs[start : start + 8])
        chosen = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        right = logits.argmax(-1) == targets
        for row in rows.unique():
            own = rows == row
            total = float(chosen[own].double().sum())
            answers.append(AnswerScore(bool(right[own].all()), total, int(own.sum())))
    return answers


class Bench:
    """One model into which systems' weights are loaded, and a memory of every score."""

    def __init__(self, base: Path, tasks: Sequence[str], work: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.tasks, self.work = tasks, work

    def answers(
        self, system: str, task: str, seed: int, count: int, state: State
    ) -> list[AnswerScore]:
        """Scores of the first `count` examples of a task under the weights `state`."""
        path = self.work / "scores" / f"{system} on {task}, seed {seed}, {count} prompts.json"
        if path.exists():
            return [AnswerScore(**answer) for answer in json.loads(path.read_text())]
        self.model.load_state_dict(state, strict=False)
        self.model.tie_weights()
        pairs = tokenised(self.tokenizer, task, RECIPES[task].config, seed, count)
        answers = score_packed(self.model, pairs)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([asdict(answer) for answer in answers]))
        found = Score.of(answers)
        print(
            f"{system:22} {task:24} seed {seed} {found.accuracy:6.3f} "
            f"{found.answer_log_likelihood:8.3f} nats",
            flush=True,
        )
        return answers

    def scores(self, system: str, seed: int, count: int, state: State) -> dict[str, Score]:
        """One set of weights on every task."""
        return {t: Score.of(self.answers(system, t, seed, count, state)) for t in self.tasks}


def best_static_merges(
    bench: Bench, base: Path, folders: dict[str, Path], prompts: int, experts: dict[str, Score]
) -> list[SystemResult]:
    """The best coefficients of every static method, chosen on the tuning seed, then reported."""
    tuned: dict[str, tuple[float, str, State]] = {}
    for name, (method, parameters) in static_configs(len(folders)).items():
        out = bench.work / "merges" / name.replace(" ", "-")
        state = static_merge(method, parameters, base, list(folders.values()), out)
        scores = bench.scores(name, TUNE_SEED, TUNE_PROMPTS, state)
        mean = normalized(scores, experts)[0]
        if mean >= tuned.get(method, (-1.0, "", {}))[0]:
            tuned[method] = (mean, name, state)
    results = []
    for method, (mean, name, state) in tuned.items():
        scores = bench.scores(name, REPORT_SEED, prompts, state)
        figures = {"total_bytes_over_base": 1.0, "tuned": name, "tuning_mean": mean}
        results.append(SystemResult("average" if method == "linear" else method, scores, figures))
    best = max(results, key=lambda result: result.figures["tuning_mean"])
    return [*results, SystemResult("best_static", best.scores, best.figures)]


def remainder_systems(
    bench: Bench, base: State, states: dict[str, State], prompts: int
) -> list[SystemResult]:
    """Low-rank experts with a router that is always right."""
    average = {
        name: (sum(state[name].float() for state in states.values()) / len(states)).to(w.dtype)
        for name, w in base.items()
    }
    references = {"extract_lora": base, "twin_merging": average}
    scores: dict[str, dict[str, Score]] = {}
    stored: dict[str, int] = {}
    for task, state in states.items():
        for name, weights, nbytes in remainders(state, references, RANKS):
            answers = bench.answers(f"{name} oracle", task, REPORT_SEED, prompts, weights)
            scores.setdefault(name, {})[task] = Score.of(answers)
            stored[name] = stored.get(name, 0) + nbytes
    return [
        SystemResult(
            f"{name}_oracle", found, {"total_bytes_over_base": 1 + stored[name] / size(base)}
        )
        for name, found in scores.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare ways of merging experts.")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="strong4")
    parser.add_argument(
        "--experts", type=Path, default=Path("experts"), help="train_experts' --out"
    )
    parser.add_argument("--base", type=Path, help="checkpoint directory of the base model")
    parser.add_argument("--work", type=Path, help="where merges and scores are kept")
    parser.add_argument("--prompts", type=int, default=64, help="prompts a task in the report")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tasks = FAMILIES[args.family]
    base = args.base or args.experts / "base"
    folders = {task: args.experts / task for task in tasks}
    bench = Bench(base, tasks, args.work or args.experts / "work" / args.family)
    start = load_file(base / "model.safetensors")
    states = {task: load_file(folder / "model.safetensors") for task, folder in folders.items()}
    experts = {
        task: Score.of(bench.answers("expert", task, REPORT_SEED, args.prompts, state))
        for task, state in states.items()
    }
    scores = bench.scores("base", REPORT_SEED, args.prompts, start)
    results = [
        SystemResult("base", scores, {"total_bytes_over_base": 1.0}),
        SystemResult("experts", experts, {"total_bytes_over_base": float(len(tasks))}),
        *best_static_merges(bench, base, folders, args.prompts, experts),
        *remainder_systems(bench, start, states, args.prompts),
    ]
    rows = to_json(results, experts)
    for result in results:
        mean, worst = recovered(result.scores, scores, experts)
        rows[result.name] |= {"recovered_mean": mean, "recovered_worst": worst}
    figures = {
        "family": {task: RECIPES[task].config for task in tasks},
        "prompts_per_task": args.prompts,
        "systems": rows,
    }
    path = record.write(
        f"experts-{len(tasks)}", figures, {"report": REPORT_SEED, "tune": TUNE_SEED}
    )
    print(f"{to_markdown(results, experts)}\nwritten to {path}")


if __name__ == "__main__":
    main()
