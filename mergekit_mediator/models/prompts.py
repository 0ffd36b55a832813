"""A prompt as token ids: through the tokenizer's chat template when it has one."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from mergekit_mediator.errors import PromptError, RoutingError

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


MIN_PROMPTS = 5


_FROM_DATASET = 200  # rows: more cost time and help little


def read_prompts(source: Path) -> list[Prompt]:
    """Lines of `{"prompt": "..."}` or `{"messages": [{"role": ..., "content": ...}]}`.

    Args:
        source: a file of such lines; or else a dataset as `datasets.load_dataset` takes it, a
            directory or a name on the Hub, of whose split `train` the first rows are used.

    Raises:
        RoutingError: the source cannot be read, is empty, or a line is not of that form.
    """
    if source.is_file() or source.suffix:
        try:
            text = source.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RoutingError(f"cannot read calibration data {source}: {error}") from error
        lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
        prompts = [_parse(line, f"{source} line {i}") for i, line in lines]
    else:
        rows = enumerate(_dataset_rows(str(source)), start=1)
        prompts = [_prompt(row, f"{source} row {i}") for i, row in rows]
    if len(prompts) < MIN_PROMPTS:
        raise RoutingError(f"{source}: at least {MIN_PROMPTS} prompts required, got {len(prompts)}")
    return prompts


def data_digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of the prompts, for the manifest."""
    text = json.dumps([p if isinstance(p, str) else [dict(m) for m in p] for p in prompts])
    return hashlib.sha256(text.encode()).hexdigest()


def _parse(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise RoutingError(f"{where} is no JSON: {error.msg}") from error
    return _prompt(record, where)


def _prompt(record: Any, where: str) -> Prompt:
    if not isinstance(record, dict):
        raise RoutingError(f"{where}: an object required, got {type(record).__name__}")
    prompt, messages = record.get("prompt"), record.get("messages")
    if isinstance(prompt, str) and prompt.strip() and messages is None:
        return prompt
    if prompt is None and isinstance(messages, list) and messages:
        for message in messages:
            fields = message if isinstance(message, dict) else {}
            if not all(isinstance(fields.get(key), str) for key in ("role", "content")):
                raise RoutingError(f"{where}: every message needs the texts `role` and `content`")
        return tuple(messages)
    raise RoutingError(f'{where}: either a text "prompt" or a list "messages" required')


def _dataset_rows(name: str) -> list[Any]:
    try:
        import datasets
    except ImportError as error:
        raise RoutingError(
            f"{name}: no file, and a dataset needs `pip install datasets`"
        ) from error
    try:
        rows = datasets.load_dataset(name, split="train", streaming=True, trust_remote_code=False)
        return list(itertools.islice(rows, _FROM_DATASET))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RoutingError(f"{name}: no file, and no dataset that can be read: {reason}") from error


def pad_token(model: PreTrainedModel) -> int:
    """The token to pad with: the model's, or the end of sequence, or 0."""
    for name in ("pad_token_id", "eos_token_id"):
        token = getattr(model.generation_config, name, None)
        if token is not None:
            return int(token[0] if isinstance(token, list) else token)
    return 0
