"""What do stored forms keep of heavy fine-tunes: of millions of tokens, tuned twice, or changed in few places?

    python benchmarks/heavy.py --out heavy --device cuda --tokens 20000000

Trains on Python source, on German prose, on problems of all reasoning tasks, on German after Python, and on
Python with most weights left as they are. Measures held-out nats per token of each, describes what it changed,
stores it in the forms of `rates`, and merges all of them within budgets. Training goes on from where it
was interrupted, an expert whose folder holds expert.json is kept, and rows that are there are not measured
again. Adds to results/heavy.json. Use --name with few --tokens: every row says how many its expert saw.

On a machine with more cores, one process trains (--part train) while others measure the experts that are
trained (--part measure), each with --kind, --workers and a --name of its own; --join puts their rows together.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import heavy_texts
import rates
import record
import torch
from artifacts import artifact
from base_models import make_base
from baselines import State, load
from heavy_texts import ROW, Rows
from heavy_training import RECIPES, losses, train
from stored_forms import Change, Form, begins, forms, settings
from trained_parts import SEED
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_mediator.evaluate.rivals import Rivals

BUDGETS = ("1.1x", "1.25x", "1.5x")
FIGURES_SECONDS = 60.0  # that another process may take for them


def figures(change: Change) -> dict[str, float]:
    """The size, the spread and the spectrum of a change, to compare with one's own.

    `rank_share_of_90` is the share of the singular values that hold 90% of a matrix's squared norm, the mean
    over matrices by their parameters.
    """
    total, whole, moved, absolute, ranks, numel = 0.0, 0.0, 0, 0.0, 0.0, 0
    for name, difference in change.differences.items():
        total += float(difference.square().sum(dtype=torch.float64))
        whole += float(change.base[name].float().square().sum(dtype=torch.float64))
        moved += int((difference != 0).sum())
        absolute += float(difference.abs().sum(dtype=torch.float64))
    for name, parts in change.parts.items():
        energy = parts.values.double().square().cumsum(0)
        count = int((energy < 0.9 * energy[-1]).sum()) + 1
        size = change.matrices[name].numel()
        ranks += size * count / min(change.matrices[name].shape)
        numel += size
    return {
        "norm_over_base": float(f"{math.sqrt(total / whole):.3g}"),
        "mean_change": float(f"{absolute / change.numel:.3g}"),
        "changed_share": round(moved / change.numel, 4),
        "rank_share_of_90": round(ranks / numel, 4),
    }


def held_out(model: Any, rows: Rows, device: str) -> rates.Nats:
    """The log-likelihood in nats of a token of held-out text, in float32."""
    batches = torch.from_numpy(rows).long().split(4 if device == "cpu" else 8)
    parameters = dict(model.named_parameters())

    def nats(weights: State) -> float:
        for name, parameter in parameters.items():
            if name in weights:
                parameter.data.copy_(weights[name])
        sums = [float(losses(model, batch.to(device))) * len(batch) for batch in batches]
        return -sum(sums) / len(rows)

    return nats


def merged(made: Rivals, budget: str, name: str, change: Change) -> tuple[State, float]:
    """An expert as the merge of all within a budget gives it back, and the bits of its file."""
    model, _ = artifact(made, budget, {"budget": budget})
    with model.mixture({name: 1.0}) as mixed:
        weights = {key: weight.clone() for key, weight in mixed.state_dict().items()}
    file = model.root / "mediator/experts" / f"{name}.safetensors"
    return weights, 8 * file.stat().st_size / change.numel


def join(name: str, parts: list[str]) -> None:
    """Put the rows of files of results into one, which says how the first was made, and how the others were."""
    found = {part: record.read(part) for part in parts if record.exists(part)}
    rows = {tuple(row[k] for k in rates.KEY): row for one in found.values() for row in one["rows"]}
    order = {kind: place for place, kind in enumerate(RECIPES)}
    made: dict[str, Any] = {}
    for part, one in found.items():
        own = {key: value for key, value in one.items() if key != "rows"}
        made = {**made, "also": {**made.get("also", {}), part: own}} if made else own
    if made:
        ordered = sorted(rows.values(), key=lambda row: order[row["expert"]])
        record.replace(name, {**made, "rows": ordered})


def wait(file: Path, seconds: float = math.inf) -> None:
    """Wait until another process has written a file, or time is over."""
    ends = time.monotonic() + seconds
    while not file.exists() and time.monotonic() < ends:
        time.sleep(0.5)


def described(change: Change, file: Path) -> dict[str, float]:
    """The figures of a change, which take minutes; computed once, then read from a file."""
    if not file.exists():
        found = figures(change)
        partial_file = file.with_suffix(".partial")
        partial_file.write_text(json.dumps(found) + "\n")
        partial_file.replace(file)
    known: dict[str, float] = json.loads(file.read_text())
    return known


def main() -> None:
    parser = argparse.ArgumentParser(description="What do stored forms keep of heavy fine-tunes?")
    parser.add_argument("--out", type=Path, default=Path("heavy"))
    parser.add_argument("--tokens", type=int, default=20_000_000, help="that an expert reads")
    parser.add_argument("--kind", choices=list(RECIPES), action="append", help="these experts only")
    parser.add_argument("--german", type=Path, action="append", default=[], help="a folder of text")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--batch", type=int, default=32, help=f"rows of {ROW} tokens in a step")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--held-out", type=int, default=heavy_texts.HELD_OUT, help="rows")
    parser.add_argument("--name", default="heavy", help="of the file of results")
    parser.add_argument("--forms", default="", help="that begin like these, separated by commas")
    parser.add_argument("--family", default="heavy", help="what to call these experts")
    parser.add_argument("--settings", action="store_true", help="our form with other settings, too")
    parser.add_argument("--threads", type=int, default=1, help="of one operation")
    parser.add_argument("--workers", type=int, help="threads that store, each weight by itself")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of training an expert")
    parser.add_argument("--part", choices=("all", "train", "measure"), default="all")
    parser.add_argument("--join", action="append", help="results to put together; nothing else")
    args = parser.parse_args()
    if args.join:
        join(args.name, args.join)
        return
    torch.set_num_threads(args.threads)
    if not (args.out / "base/config.json").exists():
        make_base("smollm2", args.out / "base")
    base, names = load(args.out / "base"), args.kind or list(RECIPES)
    tokenizer = AutoTokenizer.from_pretrained(args.out / "base")
    texts = {
        text: heavy_texts.rows(text, tokenizer, args.tokens, args.out / "texts", args.german)
        for text in sorted({RECIPES[name].text for name in names})
    }
    for name in names if args.part != "measure" else ():
        if not (args.out / name / "expert.json").exists():
            train(name, args, texts[RECIPES[name].text][0])
    if args.part == "train":
        return
    model = AutoModelForCausalLM.from_pretrained(args.out / "base", dtype=torch.float32).eval()
    model.to(args.device).requires_grad_(False)
    made = Rivals(str(args.out / "base"), {n: str(args.out / n) for n in names}, args.out / "work")
    budgets = BUDGETS if len(names) > 1 else ()
    if args.part == "measure":
        for name in names:  # all of them, because a merge takes all
            wait(args.out / name / "expert.json")
    for budget in budgets:  # while another process computes the figures
        if begins(f"budget {budget}", args.forms):
            artifact(made, budget, {"budget": budget})
    for name in names:
        rows = texts[RECIPES[name].text][1][: args.held_out]
        nats = held_out(model, rows, args.device)
        change = Change(base, load(args.out / name), args.device, args.workers)
        notes = json.loads((args.out / name / "expert.json").read_text())
        head = {"base": "SmolLM2-135M", "family": args.family, "expert": name, **notes}
        described_in = args.out / name / "figures.json"
        if budgets and args.part == "measure":
            wait(described_in, FIGURES_SECONDS)  # of the process that stores this expert alone
        head |= {"held_out_tokens": rows.size, **described(change, described_in)}
        within = {f"budget {b}": partial(merged, made, b, name) for b in budgets}
        known: dict[str, Form] = {**forms(), **(settings() if args.settings else {}), **within}
        wanted = {form: store for form, store in known.items() if begins(form, args.forms)}
        rates.add(args.name, head, change, nats, wanted, {"train": SEED})
        nats(base)  # the next expert may change other weights


if __name__ == "__main__":
    main()
