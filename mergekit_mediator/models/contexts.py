"""Which of a row's tokens say what a request is about: its context, and the part that routing looks at."""

from functools import cached_property
from itertools import takewhile
from typing import Any, Literal, get_args

from torch import Tensor

from mergekit_mediator.errors import RoutingError
from mergekit_mediator.models.prompts import render

RouteOn = Literal["prompt", "last_user"]
_IGNORED = -100  # transformers' label of a token that is not scored


class Contexts:
    """Finds turns in token ids by what the chat template puts around them."""

    def __init__(self, tokenizer: Any) -> None:
        """
        Args:
            tokenizer: of the artifact, or None.
        """
        self._tokenizer = tokenizer

    @cached_property
    def opening(self) -> list[int]:
        """What every prompt begins with: the chat template up to the first user's text."""
        if self._tokenizer is None:
            return []
        texts = render(self._tokenizer, ""), render(self._tokenizer, "x")
        return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False))]

    @cached_property
    def nothing(self) -> list[int]:
        """A prompt that says nothing: the chat template around an empty message; empty without one."""
        return render(self._tokenizer, "") if self._tokenizer else []

    @cached_property
    def _marks(self) -> tuple[list[int], list[int]]:
        """What a later user's text comes after, and what an answer comes after; empty if unknown."""
        if not getattr(self._tokenizer, "chat_template", None):
            return [], []
        probes = ["QUESTION0", "ANSWER0", "QUESTION1"]
        roles = ["user", "assistant", "user"]
        turns = [{"role": r, "content": c} for r, c in zip(roles, probes, strict=True)]
        text = self._tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        if any(probe not in text for probe in probes):
            return [], []
        between = text.split(probes[1])[1].split(probes[2])[0]
        after = text.split(probes[2])[1]
        user, answer = (
            list(self._tokenizer(part, add_special_tokens=False).input_ids)
            for part in (between, after)
        )
        return user, answer

    def counted(self, ids: Tensor, mask: Tensor, route_on: RouteOn = "prompt") -> Tensor:
        """The tokens that tell requests apart, at least one in each row.

        Args:
            ids: `[batch, length]`.
            mask: `[batch, length]`, 0 for padding.
            route_on: `prompt`: everything but what every prompt begins with; `last_user`: what comes
                after the beginning of the last user's turn.

        Returns:
            `[batch, length]` bool.

        Raises:
            RoutingError: an unknown `route_on`, or one that needs a chat template.
        """
        if route_on not in get_args(RouteOn):
            names = ", ".join(get_args(RouteOn))
            raise RoutingError(f"route_on must be one of {names}, got {route_on!r}")
        user, answer = self._marks
        if route_on == "last_user" and not user:
            raise RoutingError(
                "route_on='last_user' needs a tokenizer with a chat template for several turns: "
                "use route_on='prompt'"
            )
        counted = mask.bool().clone()
        for row, (tokens, keep) in enumerate(zip(ids.tolist(), counted.tolist(), strict=True)):
            places = [place for place, kept in enumerate(keep) if kept]
            told = [tokens[place] for place in places]
            start = len(self.opening) if told[: len(self.opening)] == self.opening else 0
            if route_on == "last_user":
                end = _find_last(told, answer)
                asked = _find_last(told[: len(told) if end is None else end], user)
                start = start if asked is None else asked + len(user)
            if start < len(places):
                counted[row, places[:start]] = False
        return counted

    def before_answer(self, ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> Tensor:
        """The tokens of each row that are context, for scoring: the rest is what is scored.

        The context is what comes before the first token with a label, if `labels` are given and
        leave some tokens out; else everything up to where the chat template opens the last answer,
        if it does; else the whole row.

        Returns:
            `[batch, length]`, as `mask`, with at least one token in each row.
        """
        context = mask.clone()
        _, answer = self._marks
        for row, (tokens, keep) in enumerate(zip(ids.tolist(), mask.tolist(), strict=True)):
            places = [place for place, kept in enumerate(keep) if kept]
            told = [tokens[place] for place in places]
            length = None
            if labels is not None:
                scored = labels[row, places].tolist()
                length = next((i for i, label in enumerate(scored) if label != _IGNORED), None)
            if not length:
                opened = _find_last(told, answer) if answer else None
                length = opened + len(answer) if opened is not None else len(told)
            context[row, places[length:]] = 0
        return context


def without_padding(ids: Tensor, padding: set[int]) -> Tensor:
    """A mask `[batch, length]` for rows that came without one: a run of padding at the end is none."""
    mask = ids.new_ones(ids.shape)
    for row, tokens in enumerate(ids.tolist()):
        length = len(tokens)
        while length > 1 and tokens[length - 1] in padding:
            length -= 1
        mask[row, length:] = 0
    return mask


def _find_last(tokens: list[int], mark: list[int]) -> int | None:
    """Where a mark begins for the last time."""
    starts = range(len(tokens) - len(mark), -1, -1)
    return next((i for i in starts if tokens[i : i + len(mark)] == mark), None)
