"""What a request to an OpenAI-like endpoint is routed by: the opening of its conversation.

The opening is the same in every later turn, so a conversation is routed once and keeps its expert: on this
server, on every other one, and after a restart.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_mediator.errors import PromptError
from mergekit_mediator.models.prompts import Prompt

# The fields of a request that hold its prompts: of chat, completions and responses.
PROMPT_FIELDS = ("messages", "prompt", "input")
# A prompt's text or turns, or its token ids.
Routable = Prompt | tuple[int, ...]


def routables(body: Mapping[str, Any]) -> list[Routable]:
    """The prompts of a request: one, or several for a batch of completions.

    Args:
        body: of the request: `messages` (chat), `prompt` (completions) or `input` (responses).

    Raises:
        PromptError: there is none of them, or none with text.
    """
    if "messages" in body:
        return [_opening(body["messages"], "messages")]
    if "prompt" in body:
        return _prompts(body["prompt"])
    if "input" in body:
        given = body["input"]
        if isinstance(given, str):
            return [_text(given, "input")]
        return [_opening(given, "input")]
    raise PromptError("no prompt to route by: `messages`, `prompt` or `input` required")


def _opening(messages: Any, where: str) -> Routable:
    """The turns up to the first one of a user, without those of the system."""
    if not isinstance(messages, list):
        raise PromptError(f"{where}: a list of messages required, got {type(messages).__name__}")
    for message in messages:
        if isinstance(message, Mapping) and message.get("role") == "user":
            return _text(_content(message.get("content")), f"{where}: the first user's turn")
    raise PromptError(f"{where}: a message of role `user` required to route by")


def _content(content: Any) -> str:
    """The text of a message; of parts, the texts of those that have one."""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        texts = [p.get("text") for p in content if isinstance(p, Mapping)]
        return "\n".join(text for text in texts if isinstance(text, str))
    return ""


def _prompts(given: Any) -> list[Routable]:
    if isinstance(given, str):
        return [_text(given, "prompt")]
    if isinstance(given, list) and given:
        if all(isinstance(token, int) for token in given):
            return [tuple(given)]
        rows: list[Routable] = []
        for row in given:
            if isinstance(row, str):
                rows.append(_text(row, "prompt"))
            elif isinstance(row, list) and row and all(isinstance(token, int) for token in row):
                rows.append(tuple(row))
            else:
                raise PromptError("prompt: texts or lists of token ids required")
        return rows
    raise PromptError(f"prompt: a text or a list required, got {type(given).__name__}")


def _text(text: str, where: str) -> str:
    if not text.strip():
        raise PromptError(f"{where}: no text to route by: name a model instead of `auto`")
    return text
