"""The losses of an expert's answers: as it is stored, as an adapter of a rank, and as `mergekit-extract-lora` has it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from train_experts import Pair, answer_logits
from transformers import AutoModelForCausalLM

from mergekit_mediator import MediatorModel
from mergekit_mediator.evaluate.rivals import Rivals, truncated

_BATCH = 8

Loss = tuple[float, float]
Losses = dict[str, Loss]
Norms = dict[str, Tensor]


@torch.no_grad()
def losses(model: Any, pairs: Sequence[Pair]) -> Loss:
    """The mean loss of answers in nats a token, and the part of answers that greedy decoding gives."""
    total = tokens = right = 0.0
    for start in range(0, len(pairs), _BATCH):
        batch = list(pairs[start : start + _BATCH])
        logits, targets, rows = answer_logits(model, batch)
        total += float(cross_entropy(logits, targets, reduction="sum"))
        tokens += len(targets)
        right += len(batch) - len(rows[logits.argmax(-1) != targets].unique())
    return total / tokens, right / len(pairs)


class Measured:
    """Figures that are measured once and kept in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._figures = json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, key: str, measure: Callable[[], Any]) -> Any:
        if key not in self._figures:
            self._figures[key] = measure()
            self._path.write_text(json.dumps(self._figures, indent=1))
            print(key, self._figures[key], flush=True)
        return self._figures[key]


def _loaded(path: Path | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def plain(path: Path | str, pairs: Sequence[Pair]) -> Loss:
    """The loss of a checkpoint in float32."""
    return losses(_loaded(path), pairs)


def stored(model: MediatorModel, name: str, pairs: Sequence[Pair]) -> Loss:
    """The loss of an expert as the artifact stores it."""
    with model.mixture(name) as mixed:
        return losses(mixed, pairs)


@torch.no_grad()
def norms_of(model: MediatorModel, name: str) -> Norms:
    """An expert's norms and biases, as the artifact stores them."""
    with model.mixture(name) as mixed:
        return {n: p.clone() for n, p in mixed.named_parameters() if p.dim() < 2}


@torch.no_grad()
def adapted(
    path: Path | str, adapter: Path, pairs: Sequence[Pair], norms: Norms | None = None
) -> Loss:
    """The loss of a checkpoint in float32 with an adapter beside its weights, with other norms if any are given.

    It is not merged: a tied embedding has an adapter as embedding and as head, and would get the change twice.
    """
    model = _loaded(path)
    for name, values in (norms or {}).items():
        model.get_parameter(name).copy_(values)
    return losses(PeftModel.from_pretrained(model, adapter).base_model.model, pairs)


@torch.no_grad()
def extracted(
    made: Rivals, name: str, rank: int, largest: int, pairs: Sequence[Pair], has_norms: bool
) -> Loss:
    """The loss of the base with what `mergekit-extract-lora` takes out of an expert, with or without its norms.

    The rank is cut from the largest. The adapter is merged: a tied embedding has one, and the head changes with it.
    """
    folder, _ = made.adapter(name, made.base, largest, "extracted")
    cut = folder if rank == largest else truncated(folder, rank)
    model = PeftModel.from_pretrained(_loaded(made.base), cut).merge_and_unload()
    if not has_norms:
        for parameter, values in _loaded(made.base).named_parameters():
            if values.dim() < 2:
                model.get_parameter(parameter).copy_(values)
    return losses(model, pairs)


def kept(base: Losses, scores: Losses, stored: Losses) -> dict[str, float]:
    """What is kept of the gain, mean over the experts and least of them, and of all right answers."""
    gains = [(base[n][0] - scores[n][0]) / (base[n][0] - stored[n][0]) for n in scores]
    right = sum(score[1] for score in scores.values()) / sum(score[1] for score in stored.values())
    return {
        "gain_kept": sum(gains) / len(gains),
        "worst_gain_kept": min(gains),
        "answers_kept": right,
    }
