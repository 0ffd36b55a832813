"""What an expert answers to prompts, and how likely it finds each token: what its stored form is fitted to."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_mediator.errors import PromptError
from mergekit_mediator.models.answers import answer_logits
from mergekit_mediator.models.prefix import read_prefix

_BATCH = 8
_LIKELY = 128
_ANSWER_TOKENS = 128


@dataclass(frozen=True)
class Answered:
    """A prompt with the expert's own answer.

    Attributes:
        prompt: token ids.
        answer: token ids, `n` of them.
        likely: `[n, k]` int64, the tokens that the expert finds likeliest in each place.
        logs: `[n, k]` float32, the logarithms of their probabilities.
    """

    prompt: list[int]
    answer: list[int]
    likely: Tensor
    logs: Tensor


def answer(
    model: Any,
    prompts: Sequence[list[int]],
    pad: int,
    step: Callable[[int], Any] = lambda _: None,
) -> list[Answered]:
    """What a model answers by greedy decoding, and how likely it finds each token.

    Args:
        model: any `AutoModelForCausalLM`, holding the expert's weights.
        prompts: token ids.
        pad: the token that fills up rows.
        step: called with the number of prompts that were answered.

    Raises:
        PromptError: a prompt that leaves no room for an answer.
    """
    found: dict[int, Answered] = {}
    with torch.no_grad():
        prefix = read_prefix(model, prompts)
        for rows in batches([len(prompt) for prompt in prompts]):
            batch = [prompts[i] for i in rows]
            pairs = list(zip(batch, _decode(model, batch, pad), strict=True))
            found_logits = answer_logits(model, pairs, prefix)
            for i, pair, logits in zip(rows, pairs, found_logits, strict=True):
                k = min(_LIKELY, logits.shape[-1])
                logs, likely = logits.float().log_softmax(-1).topk(k)
                found[i] = Answered(*pair, likely, logs)
            step(len(rows))
    return [found[i] for i in range(len(prompts))]


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """Places of what is alike in length together: less padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + _BATCH] for start in range(0, len(order), _BATCH)]


def room(config: Any, prompt: int) -> int:
    """How many tokens an answer may have, after a prompt of so many.

    Args:
        config: of the model.
        prompt: its tokens.

    Raises:
        PromptError: none.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    left = _ANSWER_TOKENS if limit is None else min(_ANSWER_TOKENS, limit - prompt)
    if left < 1:
        raise PromptError(
            f"a prompt of {prompt} tokens leaves no room for an answer: the model reads {limit}"
        )
    return left


def _decode(model: Any, prompts: Sequence[list[int]], pad: int) -> list[list[int]]:
    """The answers, each with the token that ends it, if it was reached."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad, device=model.device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, device=model.device)
        mask[row, width - len(prompt) :] = 1
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=room(model.config, width),
        do_sample=False,
        pad_token_id=pad,
    )
    given = model.generation_config.eos_token_id
    ends = set(given if isinstance(given, list) else [given])
    answers: list[list[int]] = output[:, width:].tolist()
    return [_until(tokens, ends) for tokens in answers]


def _until(tokens: list[int], ends: Collection[int | None]) -> list[int]:
    """Tokens up to the first that is an end, and that one."""
    last = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: last + 1]
