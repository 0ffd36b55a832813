"""Texts that an expert writes itself, where nobody has prompts of its task.

An expert that reads the beginning of a user's turn goes on with a request (Magpie, Xu et al., arXiv 2406.08464), and
one that reads nothing goes on with a text like those of its training. On text that is drawn from the expert, the mean
of its log-likelihood minus that of the stored form is KL(expert ‖ stored).
"""

from collections.abc import Callable, Collection
from typing import Any

import torch

from mergekit_mediator.errors import PromptError
from mergekit_mediator.models.prompts import pad_token, render
from mergekit_mediator.tune.teacher import Answered, answer, decode, room

_REQUEST_TOKENS = 64  # the most that an expert writes of a request
_AT_ONCE = 8  # requests
_SEED = 0
_TURN = "\N{SNOWMAN}turn\N{SNOWMAN}"  # a text that no template has


def write(
    model: Any, tokenizer: Any, count: int, step: Callable[[int], Any] = lambda _: None
) -> list[Answered]:
    """Let an expert write texts, drawn at temperature 1, and keep the probabilities of the likeliest tokens.

    With a chat template, up to half of the texts are requests that the expert writes and answers. All others begin with
    nothing. They come in any order. Equal experts write equal texts on the same machine.

    Args:
        model: any `AutoModelForCausalLM`, which holds the expert's weights.
        tokenizer: its tokenizer.
        count: the number of texts.
        step: called after each batch with its number of texts.

    Returns:
        The texts. The prompt of each is what it begins with, and the answer is what the expert wrote.

    Raises:
        PromptError: the tokenizer has no token to begin a text with.
    """
    with torch.random.fork_rng(devices=_devices(model)):
        torch.manual_seed(_SEED)
        requests = _requests(model, tokenizer, count // 2)
        nothing = [first_token(tokenizer)]
        prompts = [*requests, *(nothing for _ in range(count - len(requests)))]
        # in any order, because every eighth is held out
        order = torch.randperm(count).tolist()
        return answer(model, [prompts[i] for i in order], pad_token(model), step, drawn=True)


def user_turn(tokenizer: Any) -> tuple[list[int], str] | None:
    """Find how a chat template begins and ends the turn of a user.

    Returns:
        The token ids before the user's text, and the first word after it; None without a template, or if the template
        changes the text.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    message = [{"role": "user", "content": _TURN}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, found, after = str(text).partition(_TURN)
    if not found:
        return None
    end = next(iter(after.split()), "")
    return list(tokenizer(before, add_special_tokens=False).input_ids), end


def _requests(model: Any, tokenizer: Any, count: int) -> list[list[int]]:
    """Write requests, as prompts in the chat template; none that is empty."""
    turn = user_turn(tokenizer)
    if turn is None or not turn[0] or not count:
        return []
    start, end = turn
    # an answer needs as much room
    tokens = min(_REQUEST_TOKENS, room(model.config, len(start)) // 2)
    prompts = []
    for first in range(0, count, _AT_ONCE):
        starts = [start] * min(_AT_ONCE, count - first)
        for written in decode(model, starts, pad_token(model), tokens, drawn=True):
            text = _before(tokenizer.decode(written, skip_special_tokens=True), end).strip()
            if text:
                prompts.append(render(tokenizer, text))
    return prompts


def _before(text: str, end: str) -> str:
    return text.partition(end)[0] if end else text


def first_token(tokenizer: Any) -> int:
    """Return the token that a text begins with which continues nothing.

    Raises:
        PromptError: the tokenizer has no such token.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise PromptError(
        "the tokenizer has no token that begins or ends a text, so the expert cannot write one: give a file of prompts"
    )


def _devices(model: Any) -> Collection[int]:
    return [model.device.index or 0] if model.device.type == "cuda" else []
