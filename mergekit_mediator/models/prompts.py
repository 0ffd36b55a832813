"""Prompts as token ids: the tokenizer's chat template is applied if it has one."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from mergekit_mediator.errors import PromptError

# The text of a single user turn, or a conversation: mappings with `role` and `content`.
Prompt = str | tuple[Mapping[str, str], ...]


def render(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Return the token ids of a prompt, in the tokenizer's chat template if it has one.

    Raises:
        PromptError: the prompt has several messages, and the tokenizer has no chat template.
    """
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        return list(tokenizer(text, add_special_tokens=False).input_ids)
    if isinstance(prompt, str):
        return list(tokenizer(prompt).input_ids)
    if len(prompt) == 1:
        return list(tokenizer(prompt[0]["content"]).input_ids)
    raise PromptError(
        f"a conversation of {len(prompt)} messages needs a tokenizer with a chat template, got one without: "
        "give prompts of one message"
    )


def pad_token(model: PreTrainedModel) -> int:
    """Return the id of the padding token of a model: its own, else its end of sequence, else 0."""
    for name in ("pad_token_id", "eos_token_id"):
        token = getattr(model.generation_config, name, None)
        if token is not None:
            return int(token[0] if isinstance(token, list) else token)
    return 0
