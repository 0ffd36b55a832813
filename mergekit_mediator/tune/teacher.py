"""The answers of an expert to prompts, with the probabilities of their tokens. The stored form is fitted to them."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_mediator.errors import PromptError
from mergekit_mediator.models.answers import answer_logits
from mergekit_mediator.models.prefix import read_prefix

_BATCH = 8  # prompts
_LIKELY = 128  # tokens in each place whose probabilities are kept
ANSWER_TOKENS = 128


@dataclass(frozen=True)
class Answered:
    """A prompt with the expert's own answer.

    Attributes:
        prompt: token ids.
        answer: `n` token ids.
        likely: `[n, k]` int64, the likeliest tokens in each place, by the expert.
        logs: `[n, k]` float32, the natural logarithms of their probabilities.
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
    answer_tokens: int = ANSWER_TOKENS,
    drawn: bool = False,
) -> list[Answered]:
    """Answer prompts, and keep the probabilities of the likeliest tokens.

    Args:
        model: any `AutoModelForCausalLM`, which holds the expert's weights.
        prompts: token ids.
        pad: the token that fills up rows.
        step: called after each batch with its number of prompts.
        answer_tokens: the most tokens of an answer.
        drawn: draw the tokens of answers by their probabilities, instead of the likeliest ones.

    Returns:
        The answers in the order of the prompts.

    Raises:
        PromptError: a prompt leaves no room for an answer.
    """
    answers: dict[int, Answered] = {}
    with torch.no_grad():
        prefix = read_prefix(model, prompts)
        for rows in batches([len(prompt) for prompt in prompts]):
            batch = [prompts[i] for i in rows]
            decoded = decode(model, batch, pad, answer_tokens, drawn)
            pairs = list(zip(batch, decoded, strict=True))
            for i, pair, logits in zip(
                rows, pairs, answer_logits(model, pairs, prefix), strict=True
            ):
                k = min(_LIKELY, logits.shape[-1])
                logs, likely = logits.float().log_softmax(-1).topk(k)
                answers[i] = Answered(*pair, likely, logs)
            step(len(rows))
    return [answers[i] for i in range(len(prompts))]


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """Group the places of texts into batches of similar lengths, which need little padding.

    Args:
        lengths: of the texts, in tokens.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + _BATCH] for start in range(0, len(order), _BATCH)]


def room(config: Any, prompt: int, answer_tokens: int = ANSWER_TOKENS) -> int:
    """Count the tokens that an answer may have.

    Args:
        config: of the model.
        prompt: the tokens of the prompt.
        answer_tokens: the most tokens of an answer.

    Raises:
        PromptError: the model has no position for a token after the prompt.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    tokens = answer_tokens if limit is None else min(answer_tokens, limit - prompt)
    if tokens < 1:
        raise PromptError(
            f"a prompt of {prompt} tokens leaves no room for an answer: the model reads {limit}"
        )
    return tokens


def decode(
    model: Any, prompts: Sequence[list[int]], pad: int, answer_tokens: int, drawn: bool = False
) -> list[list[int]]:
    """Decode answers, each with its end token if the model reached one; see `answer`."""
    # plain draws, whatever the model's own settings are
    how = dict(temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0) if drawn else {}
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad, device=model.device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, device=model.device)
        mask[row, width - len(prompt) :] = 1
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=room(model.config, width, answer_tokens),
        do_sample=drawn,
        **how,
        pad_token_id=pad,
    )
    end = model.generation_config.eos_token_id
    ends = set(end if isinstance(end, list) else [end])
    answers: list[list[int]] = output[:, width:].tolist()
    return [_until(tokens, ends) for tokens in answers]


def _until(tokens: list[int], ends: Collection[int | None]) -> list[int]:
    """The tokens up to the first end token, with that one."""
    last = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: last + 1]
