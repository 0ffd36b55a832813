"""The tokens of a row that tell its task: the context of an answer, and the part that routing looks at."""

from functools import cached_property
from itertools import takewhile
from typing import Any, Literal, get_args

from torch import Tensor

from mergekit_mediator.errors import RoutingError
from mergekit_mediator.models.prompts import render

RouteOn = Literal["prompt", "last_user"]
_IGNORED = -100  # transformers' label of a token that is not scored


class Contexts:
    """A finder of a chat's turns in token ids, by the tokens that the chat template puts around them."""

    def __init__(self, tokenizer: Any) -> None:
        """Make a finder for a tokenizer.

        Args:
            tokenizer: that of the artifact, or None.
        """
        self._tokenizer = tokenizer

    @cached_property
    def opening(self) -> list[int]:
        """The first token ids of every prompt: the chat template up to the text of the first user turn."""
        if self._tokenizer is None:
            return []
        texts = render(self._tokenizer, ""), render(self._tokenizer, "x")
        return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False))]

    @cached_property
    def nothing(self) -> list[int]:
        """The token ids of an empty message in the chat template; an empty list without a tokenizer."""
        return render(self._tokenizer, "") if self._tokenizer else []

    @cached_property
    def _marks(self) -> tuple[list[int], list[int]]:
        """The token ids before the text of a later user turn, and those before an answer; empty if unknown."""
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
        """Mark the tokens that routing looks at, at least one in each row.

        Args:
            ids: `[batch, length]` int64.
            mask: `[batch, length]`, 0 for padding.
            route_on: `prompt` for the whole prompt without `opening`; `last_user` for the last user turn
                and all that follows it.

        Returns:
            `[batch, length]` bool.

        Raises:
            RoutingError: `route_on` is unknown, or needs a chat template that the tokenizer does not have.
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
        for row, (row_ids, row_mask) in enumerate(zip(ids.tolist(), counted.tolist(), strict=True)):
            places = [place for place, is_token in enumerate(row_mask) if is_token]
            tokens = [row_ids[place] for place in places]
            start = len(self.opening) if tokens[: len(self.opening)] == self.opening else 0
            if route_on == "last_user":
                end = _find_last(tokens, answer)
                turn = _find_last(tokens[: len(tokens) if end is None else end], user)
                start = start if turn is None else turn + len(user)
            if start < len(places):
                counted[row, places[:start]] = False
        return counted

    def before_answer(self, ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> Tensor:
        """Mark the context of each row: the tokens before the answer that is scored.

        With `labels` that leave out the first tokens, the context ends before the first token with a label.
        Otherwise it ends where the chat template opens the last answer. Without such a place it is the
        whole row.

        Args:
            ids: `[batch, length]` int64.
            mask: `[batch, length]`, 0 for padding.
            labels: `[batch, length]` int64, -100 for tokens that are not scored; None without labels.

        Returns:
            `[batch, length]` in the dtype of `mask`, with at least one token in each row.
        """
        context = mask.clone()
        _, answer = self._marks
        for row, (row_ids, row_mask) in enumerate(zip(ids.tolist(), mask.tolist(), strict=True)):
            places = [place for place, is_token in enumerate(row_mask) if is_token]
            tokens = [row_ids[place] for place in places]
            length = None
            if labels is not None:
                row_labels = labels[row, places].tolist()
                length = next((i for i, label in enumerate(row_labels) if label != _IGNORED), None)
            if not length:
                start = _find_last(tokens, answer) if answer else None
                length = start + len(answer) if start is not None else len(tokens)
            context[row, places[length:]] = 0
        return context


def without_padding(ids: Tensor, padding: set[int]) -> Tensor:
    """Make a mask for rows that came without one.

    Args:
        ids: `[batch, length]` int64.
        padding: the tokens that are padding where they end a row. The first token of a row is never padding.

    Returns:
        `[batch, length]` int64, 0 for padding.
    """
    mask = ids.new_ones(ids.shape)
    for row, tokens in enumerate(ids.tolist()):
        length = len(tokens)
        while length > 1 and tokens[length - 1] in padding:
            length -= 1
        mask[row, length:] = 0
    return mask


def _find_last(tokens: list[int], mark: list[int]) -> int | None:
    """Return the place of the last occurrence of a mark, or None if there is none."""
    starts = range(len(tokens) - len(mark), -1, -1)
    return next((i for i in starts if tokens[i : i + len(mark)] == mark), None)
