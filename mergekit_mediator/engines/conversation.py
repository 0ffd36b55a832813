"""The part of an OpenAI-like request that routing reads: the opening of its conversation.

The opening is the same in every later turn, so all turns of a conversation get the same expert: on this server,
on every other one, and after a restart.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_mediator.errors import PromptError
from mergekit_mediator.models.prompts import Prompt

# The fields that hold the prompts of a request: of chat, of completions, of responses, and of vLLM's own tokens.
PROMPT_FIELDS = ("messages", "prompt", "input", "token_ids")
# A prompt as text, as turns or as token ids.
Routable = Prompt | tuple[int, ...]


def routables(body: Mapping[str, Any]) -> list[Routable]:
    """Return the prompts of a request: one, or several for a batch of completions.

    Args:
        body: the request's JSON object, with `messages` (chat), `prompt` (completions), `input` (responses) or
            `token_ids` (vLLM's `/inference/v1/generate`).

    Raises:
        PromptError: the request has none of these fields, or a prompt has no text.
    """
    if "messages" in body:
        return [_opening(body["messages"], "messages")]
    if "prompt" in body:
        return _prompts(body["prompt"])
    if "input" in body:
        turns = body["input"]
        if isinstance(turns, str):
            return [_text(turns, "input")]
        return [_opening(turns, "input")]
    if "token_ids" in body:
        return _prompts(body["token_ids"], "token_ids")
    raise PromptError(
        "no prompt to route by: `messages`, `prompt`, `input` or `token_ids` is required"
    )


def _opening(messages: Any, where: str) -> Routable:
    """Return the text of the first user's turn; the turns before it, such as the system's, tell no task."""
    if not isinstance(messages, list):
        raise PromptError(f"{where}: a list of messages is required, got {type(messages).__name__}")
    for message in messages:
        if isinstance(message, Mapping) and message.get("role") == "user":
            return _text(_content(message.get("content")), f"{where}: the first user's turn")
    raise PromptError(f"{where}: a message of role `user` is required to route by")


def _content(content: Any) -> str:
    """Return the text of a message; of a message in parts, the lines of its text parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        return "\n".join(text for text in texts if isinstance(text, str))
    return ""


def _prompts(prompt: Any, where: str = "prompt") -> list[Routable]:
    """Return the prompts of a request for completions: a text, token ids, or a list of these."""
    if isinstance(prompt, str):
        return [_text(prompt, where)]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(token, int) for token in prompt):
            return [tuple(prompt)]
        rows: list[Routable] = []
        for row in prompt:
            if isinstance(row, str):
                rows.append(_text(row, where))
            elif isinstance(row, list) and row and all(isinstance(token, int) for token in row):
                rows.append(tuple(row))
            else:
                raise PromptError(f"{where}: a list of texts or of lists of token ids is required")
        return rows
    raise PromptError(
        f"{where}: a text or a list with an entry is required, got {type(prompt).__name__}"
    )


def _text(text: str, where: str) -> str:
    """Return a text, and refuse one that routing cannot read."""
    if not text.strip():
        raise PromptError(f"{where}: no text to route by: name a model instead of `auto`")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{where}: text in Unicode is required, got half of a surrogate pair, {text[error.start]!r}: "
            "send the whole character"
        ) from error
    return text
