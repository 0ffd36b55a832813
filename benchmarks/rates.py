"""How much of a fine-tune's gain does each form keep at each rate, ours and others'?

    python benchmarks/rates.py --base BASE --base-name SmolLM2-135M --family strong --experts DIR --tasks A,B

`gain_kept` is the part of the way from the base (0) to the expert (1) that the log-likelihood of the
answers to held-out prompts goes, within these bounds. Nothing is fitted to prompts. Bits are counted for the
parameters of the weights that the expert changed. Rows are written one by one, and those that are there are
not measured again, so the command may be interrupted and repeated. Adds to results/rates.json, or to a file of
--name; --settings measures our form with other settings, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import record
import torch
from artifacts import DTYPE
from baselines import State, expert, load, task_config
from stored_forms import Change, Form, begins, forms, settings
from torch import Tensor
from train_experts import REPORT_SEED
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_mediator.evaluate.scorer import score
from mergekit_mediator.evaluate.tasks import from_reasoning_gym

KEY = ("base", "family", "expert", "form")
# The log-likelihood in nats per token of held-out text, given the weights that differ from the base's.
Nats = Callable[[State], float]


def measure(change: Change, nats: Nats, wanted: Mapping[str, Form]) -> Iterator[dict[str, Any]]:
    """The rate of each form, and the gain that it keeps."""
    base, best = nats(change.base), nats(change.expert)
    for form, store in wanted.items():
        weights, bits = store(change)
        reached = nats(weights)
        yield {
            "form": form,
            "bits_per_parameter": round(bits, 4),
            "left_out": round(left_out(change, weights), 5),
            "gain_kept": round(min(1.0, max(0.0, (reached - base) / (best - base))), 4),
            "nats": round(reached, 5),
            "base_nats": round(base, 5),
            "expert_nats": round(best, 5),
            "parameters": change.numel,
        }


def left_out(change: Change, weights: State) -> float:
    """The squared error of weights, over the squared change."""

    def error(name: str) -> Tensor:
        weight, right = (w[name].to(change.device).float() for w in (weights, change.expert))
        return (weight - right).square().sum(dtype=torch.float64)

    return sum(float(error(name)) for name in change.differences) / change.energy


def add(
    name: str,
    head: dict[str, Any],
    change: Change,
    nats: Nats,
    wanted: Mapping[str, Form],
    seeds: dict[str, int],
) -> None:
    """Measure the forms of one expert that results/NAME.json has no row of, and write them one by one."""
    rows = record.read(name)["rows"] if record.exists(name) else []
    known = {tuple(row[key] for key in KEY) for row in rows}
    missing = {f: s for f, s in wanted.items() if (*(head[key] for key in KEY[:3]), f) not in known}
    for row in measure(change, nats, missing) if missing else ():
        rows.append({**head, **row})
        record.write(name, {"rows": rows}, seeds)
        print(rows[-1], flush=True)


def answers(model: Any, tokenizer: Any, folder: Path, prompts: int, seed: int) -> Nats:
    """The log-likelihood of right answers to held-out prompts of an expert's task."""
    examples = from_reasoning_gym(folder.name, prompts, seed, task_config(folder)).examples
    parameters = dict(model.named_parameters())

    def nats(weights: State) -> float:
        for name, weight in weights.items():
            parameters[name].data.copy_(weight)
        return score(model, tokenizer, examples).answer_log_likelihood

    return nats


def main() -> None:
    parser = argparse.ArgumentParser(description="How much of the gain is kept at each rate?")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--base-name", required=True, help="what to call the base")
    parser.add_argument("--family", required=True, help="what to call these experts")
    parser.add_argument("--experts", type=Path, required=True)
    parser.add_argument("--tasks", required=True, help="folders of experts, separated by commas")
    parser.add_argument("--prompts", type=int, default=64, help="of each task")
    parser.add_argument("--seed", type=int, default=REPORT_SEED)
    parser.add_argument("--name", default="rates", help="of the file of results")
    parser.add_argument("--forms", default="", help="that begin like these, separated by commas")
    parser.add_argument("--settings", action="store_true", help="our form with other settings")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(args.threads)
    base = load(args.base)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=DTYPE).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    for task in args.tasks.split(","):
        head: dict[str, Any] = {"base": args.base_name, "family": args.family, "expert": task}
        nats = answers(model, tokenizer, args.experts / task, args.prompts, args.seed)
        change = Change(base, expert(base, args.experts / task))
        head["prompts"] = args.prompts
        wanted = forms(args.forms)
        if args.settings:
            wanted |= {name: form for name, form in settings().items() if begins(name, args.forms)}
        add(args.name, head, change, nats, wanted, {"prompts": args.seed})
        nats(change.base)  # the next expert changes other weights


if __name__ == "__main__":
    main()
