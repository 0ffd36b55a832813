"""The logits that predict answers, by teacher forcing: one forward pass per batch, without decoding."""

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
    """Compute the logits that predict each answer of a batch.

    Args:
        model: any `AutoModelForCausalLM`.
        batch: prompts and answers, as token ids.
        prefix: the common first tokens of all prompts, which the model does not read again; see `read_prefix`.

    Returns:
        For each pair, `[answer tokens, vocabulary]` in the model's dtype.
    """
    start = prefix.length if prefix is not None else 0
    width = max(len(prompt) + len(answer) for prompt, answer in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    for row, (prompt, answer) in enumerate(batch):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        mask[row, : len(prompt) + len(answer)] = 1
    spans = [range(len(p) - 1 - start, len(p) + len(a) - 1 - start) for p, a in batch]
    columns = sorted({column for span in spans for column in span})
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {"input_ids": ids[:, start:].to(device), "use_cache": False}
    inputs["attention_mask"] = mask.to(device)
    if prefix is not None:
        inputs |= prefix.inputs(len(batch))
    # The vocabulary is large. So the head runs on the answers' columns only, if the model allows that.
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        indices = torch.tensor(columns, device=device)
        logits = model(**inputs, logits_to_keep=indices).logits
        place = {column: i for i, column in enumerate(columns)}
    else:
        logits = model(**inputs).logits
        place = {column: column for column in columns}
    return (logits[row, [place[c] for c in span]] for row, span in enumerate(spans))
