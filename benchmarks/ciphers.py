"""Small full fine-tunes by the dozen: models of half a million parameters, each of which learned one cipher.

A prompt names a cipher and some words; the answer is those words, each replaced as the cipher says. The
base copies the words, whatever cipher is named.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from artifacts import artifact, artifact_systems
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mergekit_mediator import MediatorModel
from mergekit_mediator.evaluate.contenders import checkpoint
from mergekit_mediator.evaluate.results import SystemResult, to_json
from mergekit_mediator.evaluate.rivals import Rivals
from mergekit_mediator.evaluate.scorer import Scorer
from mergekit_mediator.evaluate.systems import expert_systems, mediator_systems
from mergekit_mediator.evaluate.tasks import Example, Task
from mergekit_mediator.evaluate.trials import average
from mergekit_mediator.models.loading import load_plain
from mergekit_mediator.route.calibrate import calibrate_artifact

SEED = 0
MOST = 32
PROMPTS = 16
WORDS = [f"w{i}" for i in range(64)]
NAMES = [f"cipher{i:02d}" for i in range(MOST)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
VOCABULARY = [*SPECIAL, *NAMES, *WORDS]
TEMPLATE = "{% for m in messages %}<s> {{ m['content'] }} </s> {% endfor %}<s>"
LENGTH = 4
MEDIATORS: dict[str, dict[str, Any]] = {
    "bits: 1": {"route": "all", "bits": 1.0},
    "budget: 2x": {"budget": "2x"},
}
CALIBRATED = "bits: 1"


def make_tokenizer() -> Any:
    """One token a word."""
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, "<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(zip(("pad", "bos", "eos", "unk"), SPECIAL, strict=True))
    named = {f"{name}_token": token for name, token in special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=plain, chat_template=TEMPLATE, **named)


def cipher(name: str) -> list[int]:
    """Which word stands for each."""
    return random.Random(f"{SEED} {name}").sample(range(len(WORDS)), len(WORDS))


def examples(name: str, count: int, seed: str) -> list[Example]:
    """Prompts that name a cipher, and the enciphered words."""
    draw, code = random.Random(f"{seed} {name}"), cipher(name)
    found = []
    for _ in range(count):
        words = draw.choices(range(len(WORDS)), k=LENGTH)
        prompt = " ".join([name, *(WORDS[i] for i in words)])
        found.append(Example(prompt, " ".join(WORDS[code[i]] for i in words)))
    return found


def make_model() -> Any:
    """A Llama of half a million parameters."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def train(model: Any, names: list[str], codes: list[list[int]], steps: int, lr: float) -> None:
    """Learn to answer prompts that name any of these ciphers by the code beside it."""
    words, marks = torch.tensor(codes), torch.tensor([VOCABULARY.index(n) for n in names])
    first, batch = VOCABULARY.index(WORDS[0]), 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    fixed = torch.ones(batch, 1, dtype=torch.long)
    for _ in range(steps):
        which = torch.randint(len(names), (batch,))
        text = torch.randint(len(WORDS), (batch, LENGTH))
        answer = words[which].gather(1, text)
        prompt = [fixed, marks[which][:, None], text + first, 2 * fixed, fixed]
        ids = torch.cat([*prompt, answer + first, 2 * fixed], 1)
        logits = model(ids[:, :-1]).logits[:, -LENGTH - 1 :]
        cross_entropy(logits.flatten(0, 1), ids[:, -LENGTH - 1 :].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def make_family(work: Path, count: int) -> tuple[Path, dict[str, Path]]:
    """The base and `count` experts on disk; what is there is used again."""
    base, tokenizer = work / "ciphers" / "base", make_tokenizer()
    if not (base / "config.json").exists():
        torch.manual_seed(SEED)
        model: Any = make_model()
        train(model, NAMES, [list(range(len(WORDS)))] * MOST, 400, 2e-3)
        model.to(torch.bfloat16).save_pretrained(base)
        tokenizer.save_pretrained(base)
    experts = {name: work / "ciphers" / name for name in NAMES[:count]}
    for index, (name, folder) in enumerate(experts.items()):
        if not (folder / "config.json").exists():
            torch.manual_seed(SEED + 1 + index)
            model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
            train(model, [name], [cipher(name)], 120, 1e-3)
            model.to(torch.bfloat16).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            print(f"{name} trained", flush=True)
    return base, experts


def calibrated(made: Rivals, names: list[str], out: Path) -> Path:
    """The artifact of `CALIBRATED` with a router that knows 20 other prompts of each cipher."""
    if not out.exists():
        model, _ = artifact(made, CALIBRATED, MEDIATORS[CALIBRATED])
        shutil.copytree(model.root, out)
        data = {}
        for name in names:
            data[name] = out.parent / f"{name}.jsonl"
            lines = [json.dumps({"prompt": e.prompt}) for e in examples(name, 20, "calibration")]
            data[name].write_text("\n".join(lines))
        calibrate_artifact(out, load_plain(out), model.tokenizer, data)
    return out


def quality(work: Path, counts: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """By number of experts and system: scores as `results.to_json` gives them, without the tasks.

    Given again after each number of experts.
    """
    base, folders = make_family(work, max(counts))
    scorer = Scorer(make_tokenizer(), work / "scores.json")
    figures: dict[str, Any] = {"prompts_per_task": PROMPTS, "words": len(WORDS)}
    for count in counts:
        experts = {name: str(folder) for name, folder in list(folders.items())[:count]}
        tasks = {n: Task(n, tuple(examples(n, PROMPTS, "report"))) for n in experts}
        made = Rivals(str(base), experts, work / f"merges-{count}")
        mean = average(made)
        averaged = {"total_bytes_over_base": 1.0, "merge_cpu_seconds": mean.seconds}
        results = expert_systems(scorer, tasks, experts, each=False)
        scores = scorer.alike("average", tasks, checkpoint(mean.folder))
        results.append(SystemResult("average", scores, averaged))
        for label, parameters in MEDIATORS.items():
            own = artifact_systems(made, scorer, tasks, label, parameters)
            results += [replace(result, name=f"{result.name}, {label}") for result in own]
        folder = calibrated(made, list(experts), work / f"calibrated-{count}")
        *_, routed = mediator_systems(MediatorModel.from_pretrained(folder), scorer, tasks)
        results.append(replace(routed, name=f"mediator, {CALIBRATED}, calibrated"))
        rows = to_json(results)
        for row in rows.values():
            tasks_scored = row.pop("tasks")
            accuracies = [score["accuracy"] for score in tasks_scored.values()]
            row["accuracy"] = sum(accuracies) / len(accuracies)
        figures[str(count)] = rows
        yield figures
