"""Do texts that an expert writes itself tell what its stored form keeps, where nobody has prompts of its task?

    python benchmarks/own_texts.py --base BASE --experts DIR --tasks A,B --family strong
    python benchmarks/own_texts.py --base BASE --heavy DIR --kind python --family "broad, begun"

Each expert is stored in our form at a few rates. Four figures stand side by side, all relative to the base: the part of
the gain that the weights predict; 1 − KL(expert ‖ stored) / KL(expert ‖ base) on texts that the expert writes; the same
on held-out prompts of its task with its own answers, or on held-out text; and the part of the gain in log-likelihood
that is kept there. With --keep each expert is merged by `keep` instead, without and with texts of its own. Rows are
added to results/own-texts.json expert by expert, and those that are there are not measured again.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import heavy
import heavy_texts
import rates
import record
import torch
from artifacts import DTYPE, artifact
from baselines import State, expert, load, task_config
from stored_forms import Change, ours
from train_experts import REPORT_SEED
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_mediator.delta.kept import predicted_kept
from mergekit_mediator.evaluate.rivals import Rivals
from mergekit_mediator.evaluate.tasks import from_reasoning_gym
from mergekit_mediator.models.answers import answer_logits
from mergekit_mediator.models.prompts import pad_token, render
from mergekit_mediator.store.manifest import read_manifest
from mergekit_mediator.tune.fit import divergence
from mergekit_mediator.tune.teacher import Answered, answer
from mergekit_mediator.tune.written import write

NAME = "own-texts"
Stored = tuple[State, float]  # the weights as they are given back, and bits per parameter
RATES = (0.08, 0.15, 0.5, 1.0)
_LIKELY = 128  # tokens whose probabilities are compared, as in a merge


def held_out_text(model: Any, rows: torch.Tensor) -> list[Answered]:
    """Rows of held-out text, with the probabilities that the model gives to their tokens."""
    texts = []
    for row in rows.tolist():
        pair = (row[:1], row[1:])
        (logits,) = answer_logits(model, [pair])
        logs, likely = logits.float().log_softmax(-1).topk(_LIKELY)
        texts.append(Answered(*pair, likely, logs))
    return texts


def measured(
    change: Change, model: Any, texts: dict[str, list[Answered]], nats: rates.Nats
) -> list[dict[str, Any]]:
    """The figures of each rate."""
    places = dict(model.named_parameters())

    def become(weights: State) -> None:
        for name, weight in weights.items():
            places[name].data.copy_(weight)

    become(change.base)
    of_base = {name: divergence(model, known) for name, known in texts.items()}
    made = {f"ours {bits:g}": ours(change, bits) for bits in RATES}
    rows = []
    for row in rates.measure(change, nats, {f: partial(_as_made, m) for f, m in made.items()}):
        become(made[row["form"]][0])
        kept = {f"kept_{n}": 1 - divergence(model, t) / of_base[n] for n, t in texts.items()}
        row["predicted"] = round(float(predicted_kept(row["left_out"])), 4)
        rows.append({**row, **{name: round(part, 4) for name, part in kept.items()}})
    return rows


def _as_made(made: tuple[State, float], _: Change) -> tuple[State, float]:
    """A form whose weights are there already, with their bits per parameter."""
    return made


def merged(
    made: Rivals, change: Change, nats: rates.Nats, keep: float, texts: int
) -> list[dict[str, Any]]:
    """The figures of a merge of one expert by `keep`, without and with texts of its own."""
    (name,) = made.experts
    rows = []
    for label, prompts in (
        (f"keep {keep:g}", {}),
        (f"keep {keep:g}, {texts} texts", {name: texts}),
    ):
        model, _ = artifact(made, label, {"keep": keep}, prompts)
        with model.mixture({name: 1.0}) as mixed:
            weights = {key: mixed.state_dict()[key].clone() for key in change.differences}
        bits = 8 * (model.root / f"mediator/experts/{name}.safetensors").stat().st_size
        known = weights, bits / change.numel
        (row,) = rates.measure(change, nats, {label: partial(_as_made, known)})
        kept: Any = read_manifest(model.root).parameters["kept"]
        rows.append(
            {**row, "predicted": kept[name]["predicted"], "kept_own": kept[name]["measured"]}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Do texts of its own tell what an expert keeps?")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--base-name", default="SmolLM2-135M")
    parser.add_argument("--family", required=True, help="what to call these experts")
    parser.add_argument("--experts", type=Path, help="train_experts' --out")
    parser.add_argument("--tasks", default="", help="folders of experts, separated by commas")
    parser.add_argument("--heavy", type=Path, help="heavy's --out")
    parser.add_argument("--kind", help="an expert of heavy")
    parser.add_argument("--tokens", type=int, default=147_456, help="that it has read")
    parser.add_argument("--texts", type=int, default=32, help="that an expert writes")
    parser.add_argument("--keep", type=float, help="merge each expert by it instead")
    parser.add_argument("--work", type=Path, default=Path("own-texts"))
    parser.add_argument("--prompts", type=int, default=32, help="of each task")
    parser.add_argument("--rows", type=int, default=32, help="of held-out text")
    parser.add_argument("--seed", type=int, default=REPORT_SEED)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    base = load(args.base)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model: Any = AutoModelForCausalLM.from_pretrained(args.base, dtype=getattr(torch, DTYPE)).eval()
    folders = [args.experts / task for task in args.tasks.split(",") if task]
    folders += [args.heavy / args.kind] if args.kind else []
    rows = record.read(NAME)["rows"] if record.exists(NAME) else []
    for folder in folders:
        head = {"base": args.base_name, "family": args.family, "expert": folder.name}
        known = [row["form"] for row in rows if all(row[key] == head[key] for key in head)]
        if any(form.startswith("keep" if args.keep else "ours") for form in known):
            continue
        change = Change(base, expert(base, folder))
        places = dict(model.named_parameters())
        for name, weight in {**base, **change.expert}.items():
            places[name].data.copy_(weight)
        if args.kind:
            # the split of the rows depends on how many the expert has read
            _, held = heavy_texts.rows(args.kind, tokenizer, args.tokens, args.heavy / "texts", [])
            nats = heavy.held_out(model, held[: args.rows], "cpu")
        else:
            drawn = from_reasoning_gym(folder.name, args.prompts, args.seed, task_config(folder))
            nats = rates.answers(model, tokenizer, folder, args.prompts, args.seed)
        if args.keep:
            alone = Rivals(str(args.base), {folder.name: str(folder)}, args.work / folder.name)
            found = merged(alone, change, nats, args.keep, args.texts)
        else:
            texts = {"own": write(model, tokenizer, args.texts)}
            if args.kind:
                texts["held_out"] = held_out_text(model, torch.from_numpy(held[: args.rows]))
            else:
                ids = [render(tokenizer, example.prompt) for example in drawn.examples]
                texts["held_out"] = answer(model, ids, pad_token(model))
            head["tokens_written"] = sum(len(text.answer) for text in texts["own"])
            found = measured(change, model, texts, nats)
        for row in found:
            rows.append({**head, "texts": args.texts, **row})
            print(json.dumps(rows[-1]), flush=True)
        record.write(NAME, {"rows": rows}, {"report": args.seed})


if __name__ == "__main__":
    main()
