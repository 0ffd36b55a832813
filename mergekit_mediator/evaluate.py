"""How well a model answers, by teacher forcing: one forward pass an example, no decoding."""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_mediator.errors import TaskError
from mergekit_mediator.prefix import Prefix, read_prefix
from mergekit_mediator.prompts import render
from mergekit_mediator.results import AnswerScore, Score
from mergekit_mediator.tasks import Example

# Prompt and answer as token ids.
Pair = tuple[list[int], list[int]]


def score(model: Any, tokenizer: Any, examples: Sequence[Example], batch_size: int = 8) -> Score:
    """Sum up `score_answers`.

    Raises:
        TaskError: no examples, or a tokenizer without an end of sequence.
    """
    return Score.of(score_answers(model, tokenizer, examples, batch_size))


def score_answers(
    model: Any, tokenizer: Any, examples: Sequence[Example], batch_size: int = 8
) -> list[AnswerScore]:
    """Score a causal language model on each example, with one forward pass and no decoding.

    The model reads prompt, answer and end of sequence, padded on the right. If at every answer
    position the most likely token is the answer's, then greedy decoding writes the answer, since
    it sees the same tokens; so the exact match of greedy decoding needs no decoding. What all
    prompts begin with, such as instructions, is read once where the model keeps an ordinary cache.

    model: any `AutoModelForCausalLM`, or what has its forward.

    Raises:
        TaskError: a tokenizer without an end of sequence.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise TaskError("the tokenizer has no end-of-sequence token, which ends an answer")
    pairs = []
    for example in examples:
        answer = tokenizer(example.answer, add_special_tokens=False).input_ids
        pairs.append((render(tokenizer, example.prompt), [*answer, end]))
    # alike in length together: less padding, and answers in the same columns
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    scores: dict[int, AnswerScore] = {}
    with torch.inference_mode():
        prefix = read_prefix(model, [prompt for prompt, _ in pairs])
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            found = answer_logits(model, [pairs[i] for i in rows], prefix)
            for i, logits in zip(rows, found, strict=True):
                target = torch.tensor(pairs[i][1], device=logits.device)
                chosen = logits.float().log_softmax(-1).gather(-1, target[:, None])
                scores[i] = AnswerScore(
                    right=bool((logits.argmax(-1) == target).all()),
                    log_likelihood=float(chosen.double().sum()),
                    tokens=len(target),
                )
    return [scores[i] for i in range(len(pairs))]


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
