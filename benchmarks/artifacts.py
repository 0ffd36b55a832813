"""What benchmarks of whole artifacts share: experts with their tasks, and merges of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from train_experts import Pair, answer_logits

from mergekit_mediator import MediatorModel
from mergekit_mediator.evaluate.results import AnswerScore, SystemResult
from mergekit_mediator.evaluate.rivals import Rivals
from mergekit_mediator.evaluate.scorer import Scorer
from mergekit_mediator.evaluate.systems import Routing, mediator_systems, sizes
from mergekit_mediator.evaluate.tasks import Task, from_reasoning_gym
from mergekit_mediator.route.calibrate import calibrate_artifact

# far from each other and from those of training, stopping and reporting
TUNE_SEED, CALIBRATION_SEED = 50_000, 300_007
# Everything is scored in it: in bfloat16 an answer may change with the prompts that share its batch.
DTYPE = "float32"
CALIBRATION_PROMPTS = 20
PROMPTS_TUNED_ON = 384
# So many times the prompts that are asked for: those that are reported are left out.
_DRAWN = 16


def tasks_of(folders: dict[str, Path], prompts: int, seed: int) -> dict[str, Task]:
    """Prompts of each expert's task, drawn as its notes say."""
    tasks = {}
    for name, folder in folders.items():
        notes = next(p for p in (folder / "expert.json", folder / "zoo.json") if p.exists())
        tasks[name] = from_reasoning_gym(
            name, prompts, seed, json.loads(notes.read_text())["config"]
        )
    return tasks


def source(base: Path, folder: Path) -> str:
    """A full model, or the base with an adapter, in mergekit's notation."""
    full = (folder / "model.safetensors").exists()
    return str(folder.resolve()) if full else f"{base.resolve()}+{folder.resolve()}"


def artifact(
    made: Rivals,
    label: str,
    parameters: dict[str, Any],
    prompts: Mapping[str, Path | int] | None = None,
) -> tuple[MediatorModel, float]:
    """Our merge of all experts with these parameters, tuned on prompts if any are given, or on so many texts that
    experts write, and the CPU seconds it took."""
    own = {
        name: {"prompts": given if isinstance(given, int) else str(given)}
        for name, given in (prompts or {}).items()
    }
    config = {
        "merge_method": "mediator",
        "base_model": made.base,
        "models": [
            {"model": place, "parameters": {"expert": name, **own.get(name, {})}}
            for name, place in made.experts.items()
        ],
        "parameters": parameters,
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    folder, seconds = made.merged(config, label.replace(" ", "-").replace(":", ""))
    return MediatorModel.from_pretrained(folder, dtype=DTYPE), seconds


def artifact_systems(
    made: Rivals,
    scorer: Scorer,
    tasks: Mapping[str, Task],
    label: str,
    parameters: dict[str, Any],
    routing: dict[str, Routing] | None = None,
    prompts: Mapping[str, Path] | None = None,
) -> list[SystemResult]:
    """`mediator_systems` of our merge, with the CPU seconds it took; routed as it routes unless told otherwise."""
    model, seconds = artifact(made, label, parameters, prompts)
    stored = sizes(MediatorModel.from_pretrained(model.root))
    results = mediator_systems(model, scorer, tasks, routing, stored)
    taken = {"merge_cpu_seconds": seconds, "parameters": parameters}
    return [replace(r, figures={**r.figures, **taken}) for r in results]


def calibrated(
    model: MediatorModel, folders: dict[str, Path], copy: Path, reported: dict[str, Task]
) -> MediatorModel:
    """A copy of an artifact whose router has seen a few prompts of each expert's task, without answers."""
    if copy.exists():
        shutil.rmtree(copy)
    shutil.copytree(model.root, copy)
    data = prompt_files(folders, CALIBRATION_PROMPTS, copy, reported)
    calibrate_artifact(copy, model.model, model.tokenizer, data)
    return MediatorModel.from_pretrained(copy, dtype=DTYPE)


def prompt_files(
    folders: dict[str, Path], count: int, beside: Path, reported: dict[str, Task]
) -> dict[str, Path]:
    """Files of prompts of each expert's task, without answers and without any prompt that is reported.

    Some tasks have few different problems, so that most of what is drawn is in the report too.
    """
    data = {}
    for name, task in tasks_of(folders, _DRAWN * count, CALIBRATION_SEED).items():
        known = {example.prompt for example in reported[name].examples}
        drawn = [e.prompt for e in task.examples if e.prompt not in known]
        lines = [json.dumps({"prompt": prompt}) for prompt in drawn[:count]]
        data[name] = beside.with_name(f"{beside.name}-{name}.jsonl")
        data[name].write_text("\n".join(lines), encoding="utf-8")
    return data


@torch.inference_mode()
def score_packed(model: Any, pairs: Sequence[Pair]) -> list[AnswerScore]:
    """What `scorer.score_answers` gives, for answers that are tokenised already."""
    answers = []
    for start in range(0, len(pairs), 8):
        logits, targets, rows = answer_logits(model, list(pairs[start : start + 8]))
        chosen = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        right = logits.argmax(-1) == targets
        for row in rows.unique():
            own = rows == row
            total = float(chosen[own].double().sum())
            answers.append(AnswerScore(bool(right[own].all()), total, int(own.sum())))
    return answers
