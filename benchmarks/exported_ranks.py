"""What adapters of a rank keep of the experts that an artifact stores; a part of serving.py.

Losses are computed in bfloat16 where the processor multiplies, as those of training are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from artifacts import artifact
from peft import PeftModel
from torch.nn.functional import cross_entropy
from train_experts import Pair, answer_logits
from transformers import AutoModelForCausalLM

from mergekit_mediator.evaluate.rivals import Rivals
from mergekit_mediator.export.adapter import write_peft
from mergekit_mediator.export.experts import StoredExperts
from mergekit_mediator.export.peft_lora import Holdable, to_adapter

REFERENCES = ("base", "mean")
_BATCH = 8


@torch.no_grad()
def losses(model: Any, pairs: Sequence[Pair]) -> tuple[float, float]:
    """The mean loss of answers in nats a token, and the part of answers that greedy decoding gives."""
    total = tokens = right = 0.0
    for start in range(0, len(pairs), _BATCH):
        batch = list(pairs[start : start + _BATCH])
        logits, targets, rows = answer_logits(model, batch)
        total += float(cross_entropy(logits, targets, reduction="sum"))
        tokens += len(targets)
        right += len(batch) - len(rows[logits.argmax(-1) != targets].unique())
    return total / tokens, right / len(pairs)


def plain(path: Path | str) -> Any:
    """A checkpoint in float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def rows(
    made: Rivals,
    pairs: dict[str, list[Pair]],
    ranks: Sequence[int],
    extract_ranks: Sequence[int],
    family: str,
    work: Path,
) -> list[dict[str, Any]]:
    """For each reference and rank: means over the experts.

    `gain_kept` is (base's loss - adapter's loss) / (base's loss - stored expert's loss), and `answers_kept`
    the right answers of the adapters over those of the stored experts. `mergekit-extract-lora`, which takes
    a minute an expert and rank, is run for some ranks.
    """
    base = plain(made.base)
    of_base = {name: losses(base, pairs[name]) for name in pairs}
    extracted = {rank: _extracted(made, pairs, rank) for rank in extract_ranks}
    result = []
    for reference in REFERENCES:
        model, _ = artifact(made, f"{family}-{reference}", {"route": "all", "reference": reference})
        stored = {}
        for name in pairs:
            with model.mixture(name) as mixed:
                stored[name] = losses(mixed, pairs[name])
        experts, holdable = StoredExperts(model.root), Holdable.of(model.root)
        for rank in ranks:
            scores, largest, left_out = {}, 0, 0.0
            for name in pairs:
                adapter = to_adapter(experts, {name: 1.0}, rank, holdable)
                folder = work / f"{family}-{reference}-{rank}-{name}"
                if not folder.exists():
                    write_peft(adapter, folder, str(model.root), torch.float32)
                adapted = PeftModel.from_pretrained(plain(model.root), folder).merge_and_unload()
                scores[name] = losses(adapted, pairs[name])
                largest = max(largest, adapter.rank)
                left_out = max(left_out, adapter.squared_error)
            row = {
                "family": family,
                "reference": reference,
                "rank": rank,
                "largest_rank": largest,
                "worst_squared_error": left_out,
                **_kept(of_base, scores, stored),
                "extract_lora_gain_kept": None,
            }
            if rank in extracted:
                row["extract_lora_gain_kept"] = _kept(of_base, extracted[rank], stored)["gain_kept"]
            print(row, flush=True)
            result.append(row)
    return result


def _extracted(
    made: Rivals,
    pairs: dict[str, list[Pair]],
    rank: int,
) -> dict[str, tuple[float, float]]:
    """The losses of what `mergekit-extract-lora` takes out of each expert."""
    scores = {}
    for name in pairs:
        folder, _ = made.adapter(name, made.base, rank, "extracted")
        adapted = PeftModel.from_pretrained(plain(made.base), folder).merge_and_unload()
        scores[name] = losses(adapted, pairs[name])
    return scores


def _kept(
    base: dict[str, tuple[float, float]],
    scores: dict[str, tuple[float, float]],
    stored: dict[str, tuple[float, float]],
) -> dict[str, float]:
    """Means over experts of what is kept of the gain and of the answers."""
    gains = [(base[n][0] - scores[n][0]) / (base[n][0] - stored[n][0]) for n in scores]
    right = sum(score[1] for score in scores.values()) / sum(score[1] for score in stored.values())
    return {"gain_kept": sum(gains) / len(gains), "answers_kept": right}
