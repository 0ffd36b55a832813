"""What do adapters keep of experts that are stored as random signs, beside those of low rank plus sparse?

    python benchmarks/signs_as_adapters.py --base BASE --experts DIR --family strong4 --work DIR

The experts of a family are merged with `keep: 0.99` in each form, and exported by `--rank auto` and by some ranks. `gain
kept` is the part of the way from the base (0) to the expert (1) that the log-likelihood of right answers to held-out
prompts goes, of the dense expert with the adapter, as an engine serves it: norms stay the dense expert's. Writes
results/signs-as-adapters.json; merges in the work folder are used again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import record
import torch
from artifacts import DTYPE, artifact, source
from baselines import State, load
from rates import Nats, answers
from train_experts import DRAW, FAMILIES, REPORT_SEED
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_mediator.delta.value_forms import RateForm
from mergekit_mediator.evaluate.rivals import Rivals
from mergekit_mediator.export.experts import StoredExperts
from mergekit_mediator.export.peft_lora import Holdable, to_adapter
from mergekit_mediator.export.rank import AUTO_KEEP, AUTO_RANKS

KEEP = 0.99
RANKS = (8, 64)
FORMS: tuple[RateForm, ...] = ("low_rank", "random_sign")


def rows(
    experts: StoredExperts, name: str, expert: State, base: State, nats: Nats
) -> Iterator[dict[str, Any]]:
    """One row for each rank of one expert, the first one chosen by `auto`."""
    dense = {weight: experts.dense.weight(weight) for weight in base}
    least, best = nats(base), nats(expert)
    holdable = Holdable.of(experts.root)
    for asked in (None, *RANKS):
        largest, keep = (asked, None) if asked else (AUTO_RANKS[-1], AUTO_KEEP)
        adapter = to_adapter(experts, {name: 1.0}, largest, holdable, keep=keep)
        changes = dict(adapter.changes())
        weights = {
            weight: (tensor.float() + changes[weight]).to(tensor.dtype)
            if weight in changes
            else tensor
            for weight, tensor in dense.items()
        }
        yield {
            "rank": adapter.rank,
            "auto": asked is None,
            "left_out": round(adapter.squared_error, 4),
            "gain_kept": round((nats(weights) - least) / (best - least), 4),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="What do adapters keep of random signs?")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--experts", type=Path, required=True)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="strong4")
    parser.add_argument("--draw", type=int, default=0, help="train_experts' --draw")
    parser.add_argument("--prompts", type=int, default=64, help="of each task")
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    seed, names = REPORT_SEED + DRAW * args.draw, FAMILIES[args.family]
    sources = {name: source(args.base, args.experts / name) for name in names}
    made = Rivals(str(args.base), sources, args.work)
    base = load(args.base)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=DTYPE).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    result: list[dict[str, Any]] = []
    for form in FORMS:
        merged, _ = artifact(made, f"adapters {form}", {"keep": KEEP, "values": form})
        for name in names:
            nats = answers(model, tokenizer, args.experts / name, args.prompts, seed)
            expert = load(args.experts / name)
            for row in rows(StoredExperts(merged.root), name, expert, base, nats):
                result.append({"expert": name, "values": form, **row})
                print(result[-1], flush=True)
                figures = {"keep": KEEP, "prompts": args.prompts, "rows": result}
                record.write("signs-as-adapters", figures, {"report": seed})


if __name__ == "__main__":
    main()
