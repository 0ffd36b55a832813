"""The logits that predict answers, by teacher forcing: one forward pass a batch, no decoding."""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_mediator.models.prefix import Prefix

# Prompt and answer as token ids.
Pair = tuple[list[int], list[int]]


def answer_logits(
    model: Any, batch: Sequence[Pair], prefix: Prefix | None = None
) -> Iterable[Tensor]:
    """For each (prompt, answer) as token ids the logits that predict the answer, `[answer tokens, vocabulary]`.

    prefix: what all prompts begin with, which is not read again; see `read_prefix`.
    """
    read = prefix.length if prefix is not None else 0
    width = max(len(prompt) + len(answer) for prompt, answer in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    for row, (prompt, answer) in enumerate(batch):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        mask[row, : len(prompt) + len(answer)] = 1
    spans = [range(len(p) - 1 - read, len(p) + len(a) - 1 - read) for p, a in batch]
    columns = sorted({column for span in spans for column in span})
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {"input_ids": ids[:, read:].to(device), "use_cache": False}
    inputs["attention_mask"] = mask.to(device)
    if prefix is not None:
        inputs |= prefix.inputs(len(batch))
    # the vocabulary is wide: where the model allows it, its head runs on the answers' columns only
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        keep = torch.tensor(columns, device=device)
        logits = model(**inputs, logits_to_keep=keep).logits
        place = {column: i for i, column in enumerate(columns)}
    else:
        logits = model(**inputs).logits
        place = {column: column for column in columns}
    return (logits[row, [place[c] for c in span]] for row, span in enumerate(spans))
