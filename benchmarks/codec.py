"""How many bits must be stored of an expert, and how?

    python benchmarks/train_experts.py --out experts
    python benchmarks/codec.py --base BASE --experts experts --tasks A,B,C --family strong

All weights are routed and every expert is selected for its own task. `loss_recovered` is the part of
the loss (nats per answer token) between the average and the expert that a stored expert takes away,
`accuracy_over_expert` its accuracy as a share of the expert's, both over the means of all tasks. The
rival is what `mergekit-extract-lora` stores: factors in bfloat16 of a truncated SVD, on the base.
Results are added to results/codec.json, family by family.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import record
import torch
from artifacts import DTYPE
from baselines import expert
from safetensors.torch import load_file
from torch import Tensor
from train_experts import REPORT_SEED
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_mediator.delta import tradeoff as budget
from mergekit_mediator.delta.approximate import approximate, as_matrix, is_vector
from mergekit_mediator.delta.decomposition import decompose
from mergekit_mediator.delta.factors import Components, Factors
from mergekit_mediator.delta.mixing import mix_
from mergekit_mediator.delta.sparse import encode
from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.delta.value_forms import Values
from mergekit_mediator.evaluate.results import Score
from mergekit_mediator.evaluate.scorer import score
from mergekit_mediator.evaluate.tasks import from_reasoning_gym
from mergekit_mediator.merge.adapters.lora import read_adapter
from mergekit_mediator.store.codec import encode_bytes

BITS = (4.0, 2.0, 1.0, 0.5, 0.2, 0.15, 0.08, 0.05)
RIVAL_RANKS = (1, 2, 4, 8, 16, 32)
PLAIN: tuple[tuple[Values, float], ...] = (
    ("exact", 0.1),
    ("exact", 0.05),
    ("int4", 0.1),
    ("sign", 1.0),
)
State = dict[str, Tensor]


class Family:
    """Experts of one base, and everything that is computed once for them."""

    def __init__(self, base: Path, experts: Path, tasks: list[str], prompts: int, seed: int):
        self.tasks = tasks
        self.base = load_file(base / "model.safetensors")
        self.adapters = {t: _adapter(experts / t) for t in tasks}
        self.experts = {t: expert(self.base, experts / t) for t in tasks}
        self.mean = {
            name: torch.stack([e[name].float() for e in self.experts.values()]).mean(0).to(w.dtype)
            for name, w in self.base.items()
        }
        self.numel = sum(w.numel() for w in self.base.values())
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPE).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.examples = {
            t: from_reasoning_gym(t, prompts, seed, _config(experts / t)).examples for t in tasks
        }
        self.components: dict[tuple[str, str], Components] = {}
        self.costs: dict[str, Tensor] = {}

    def difference(self, task: str, name: str) -> Tensor:
        return self.experts[task][name].float() - self.base[name].float()

    def decompose(self) -> None:
        for task in self.tasks:
            total = torch.zeros(4, len(budget.SLOPES), dtype=torch.float64)
            for name, weight in self.base.items():
                delta = self.difference(task, name)
                known = None if is_vector(weight) else decompose(as_matrix(delta))
                if known:
                    self.components[task, name] = known
                total += budget.tradeoff(delta, known)
            self.costs[task] = total[0]

    def relative_error(self, states: dict[str, State]) -> float:
        """Squared error of the weights over the squared change of the fine-tunes, mean over experts."""
        shares = []
        for task, state in states.items():
            error = sum(
                float((state[name].float() - weight.float()).square().sum(dtype=torch.float64))
                for name, weight in self.experts[task].items()
            )
            change = sum(
                float(self.difference(task, name).square().sum(dtype=torch.float64))
                for name in self.base
            )
            shares.append(error / change)
        return sum(shares) / len(shares)

    def score(self, task: str, state: State) -> Score:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state[name])
        return score(self.model, self.tokenizer, self.examples[task])


def _adapter(folder: Path) -> dict[str, Factors]:
    """The factors of an adapter; none for a full fine-tune."""
    return {} if (folder / "model.safetensors").exists() else read_adapter(folder) or {}


def _config(folder: Path) -> dict[str, Any]:
    """What the task's problems are drawn from, as written beside the expert."""
    notes = [path for path in (folder / "expert.json", folder / "zoo.json") if path.exists()]
    return json.loads(notes[0].read_text())["config"]


def stored_experts(
    family: Family, store: Callable[[str, str], StoredWeight]
) -> tuple[float, dict[str, State]]:
    """Mean bits per parameter, and the weights of each expert as a mixture gives them."""
    states: dict[str, State] = {task: {} for task in family.tasks}
    stored_bytes = 0
    for name, dense in family.mean.items():
        stored = {task: store(task, name) for task in family.tasks}
        for tensor in stored.values():
            stored_bytes += encode_bytes(tensor, dense)[0].numel()
        for task in family.tasks:
            weight = dense.clone()
            chosen = [
                (tensor.coefficient(float(other == task), 1.0), tensor)
                for other, tensor in stored.items()
                if other == task or tensor.share
            ]
            mix_(weight, chosen)
            states[task][name] = weight
    return 8 * stored_bytes / family.numel / len(family.tasks), states


def low_rank_plus_sparse(family: Family, bits: float) -> Callable[[str, str], StoredWeight]:
    slopes = {t: budget.slope_for(family.costs[t], family.numel, bits) for t in family.tasks}
    share = 1 / len(family.tasks)

    def store(task: str, name: str) -> StoredWeight:
        known = family.components.get((task, name))
        dtype = family.base[name].dtype
        return approximate(family.difference(task, name), slopes[task], dtype, share, known)

    return store


def own_factors(family: Family) -> Callable[[str, str], StoredWeight]:
    share = 1 / len(family.tasks)

    def store(task: str, name: str) -> StoredWeight:
        weight, factors = family.base[name], family.adapters[task].get(name)
        if factors is None:
            return encode(weight, weight, 1.0)
        return StoredWeight.of_factors(tuple(weight.shape), weight.dtype, factors, share)

    return store


def plain(family: Family, values: Values, density: float) -> Callable[..., StoredWeight]:
    def store(task: str, name: str) -> StoredWeight:
        return encode(family.experts[task][name], family.mean[name], density, values)

    return store


def extracted_adapters(family: Family, rank: int) -> tuple[float, dict[str, State]]:
    stored_bytes, states = 0, {}
    for task in family.tasks:
        states[task] = dict(family.base)
        for name, weight in family.base.items():
            known = family.components.get((task, name))
            if known is None:
                continue
            left = (known.left[:, :rank] * known.values[:rank]).bfloat16()
            right = known.right[:, :rank].bfloat16()
            changed = weight.float() + (left.float() @ right.float().T).view_as(weight)
            states[task][name] = changed.to(weight.dtype)
            stored_bytes += 2 * (left.numel() + right.numel())
    return 8 * stored_bytes / family.numel / len(family.tasks), states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--experts", type=Path, required=True)
    parser.add_argument("--tasks", required=True, help="folders of experts, separated by commas")
    parser.add_argument("--family", required=True, help="what to call these experts")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seed", type=int, default=REPORT_SEED)
    parser.add_argument("--name", default="codec")
    parser.add_argument("--only", default="", help="these codecs, separated by commas")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    family = Family(args.base, args.experts, args.tasks.split(","), args.prompts, args.seed)
    best = {t: family.score(t, family.experts[t]) for t in family.tasks}
    least = {t: family.score(t, family.mean) for t in family.tasks}
    family.decompose()
    codecs: dict[str, Callable[[], tuple[float, dict[str, State]]]] = {}
    for bits in BITS:
        codecs[f"bits: {bits:g}"] = partial(
            stored_experts, family, low_rank_plus_sparse(family, bits)
        )
    for values, density in PLAIN:
        codecs[f"{values} {density:g}"] = partial(
            stored_experts, family, plain(family, values, density)
        )
    if all(family.adapters.values()):
        codecs["adapter"] = lambda: stored_experts(family, own_factors(family))
    for rank in RIVAL_RANKS:
        codecs[f"extract-lora {rank}"] = partial(extracted_adapters, family, rank)

    def mean(scores: dict[str, Score], figure: str) -> float:
        return sum(getattr(score, figure) for score in scores.values()) / len(scores)

    path = record.RESULTS / f"{args.name}.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    chosen = args.only.split(",") if args.only else list(codecs)
    rows = [r for r in kept if r["family"] != args.family or r["codec"] not in chosen]
    for name in chosen:
        codec = codecs[name]
        started = time.perf_counter()
        bits, states = codec()
        seconds = time.perf_counter() - started
        scores = {t: family.score(t, states[t]) for t in family.tasks}
        likelihood = "answer_log_likelihood"
        worst = mean(least, likelihood)
        row: dict[str, Any] = {
            "codec": name,
            "family": args.family,
            "bits_per_parameter": round(bits, 4),
            "bytes_per_expert": round(bits * family.numel / 8),
            "relative_error": round(family.relative_error(states), 4),
            "answer_log_likelihood": round(mean(scores, likelihood), 4),
            "accuracy": round(mean(scores, "accuracy"), 4),
            "loss_recovered": round(
                (mean(scores, likelihood) - worst) / (mean(best, likelihood) - worst), 4
            ),
            "accuracy_over_expert": round(mean(scores, "accuracy") / mean(best, "accuracy"), 4),
            "average_accuracy_over_expert": round(
                mean(least, "accuracy") / mean(best, "accuracy"), 4
            ),
            "tasks": family.tasks,
            "prompts": args.prompts,
            "encode_and_apply_seconds": round(seconds, 1),
        }
        rows.append(row)
        print(row, flush=True)
        record.write(args.name, {"rows": rows}, {"prompts": args.seed})


if __name__ == "__main__":
    main()
