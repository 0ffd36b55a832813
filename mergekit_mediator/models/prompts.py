"""A prompt as token ids: through the tokenizer's chat template when it has one."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from mergekit_mediator.errors import PromptError

# The text of a single user turn, or a conversation: mappings with `role` and `content`.
Prompt = str | tuple[Mapping[str, str], ...]


def render(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, through the tokenizer's chat template when it has one.

    Raises:
        PromptError: a conversation of several messages, and no chat template.
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
        f"a conversation of {len(prompt)} messages needs a tokenizer with a chat template"
    )


def pad_token(model: PreTrainedModel) -> int:
    """The token to pad with: the model's, or the end of sequence, or 0."""
    for name in ("pad_token_id", "eos_token_id"):
        token = getattr(model.generation_config, name, None)
        if token is not None:
            return int(token[0] if isinstance(token, list) else token)
    return 0
