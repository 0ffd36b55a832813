"""Files of prompts: one JSON object a line, or a dataset as the library `datasets` loads it."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_mediator.errors import PromptError
from mergekit_mediator.models.prompts import Prompt

# Fewer prompts of an expert tell nothing of how people word its task.
MIN_PROMPTS = 5
_FROM_DATASET = 200  # rows: more cost time and help little

Record = Mapping[str, Any]


def read_prompts(source: Path) -> list[Prompt]:
    """Read lines of `{"prompt": "..."}` or `{"messages": [{"role": ..., "content": ...}]}`.

    Args:
        source: a file of such lines; or else a dataset as `datasets.load_dataset` takes it, a
            directory or a name on the Hub, of whose split `train` the first rows are used.

    Raises:
        PromptError: the source cannot be read, holds fewer than 5 prompts, or a line is not of that form.
    """
    if source.is_file() or source.suffix:
        records = read_records(source)
    else:
        rows = _dataset_rows(str(source))
        records = [(f"{source} row {i}", row) for i, row in enumerate(rows, start=1)]
    prompts = [parse_prompt(record, where) for where, record in records]
    if len(prompts) < MIN_PROMPTS:
        raise PromptError(f"{source}: at least {MIN_PROMPTS} prompts required, got {len(prompts)}")
    return prompts


def read_records(path: Path) -> list[tuple[str, Record]]:
    """Read a file of one JSON object a line; blank lines are passed over.

    Returns:
        The place of each object, for error messages, and the object.

    Raises:
        PromptError: the file cannot be read, or a line is no JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path}: cannot be read: {error}") from error
    lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return [(f"{path} line {i}", _parse(line, f"{path} line {i}")) for i, line in lines]


def parse_prompt(record: Record, where: str) -> Prompt:
    """The prompt of an object with a text `prompt` or a list `messages`.

    Raises:
        PromptError: it has neither or both, or a message has no role or content.
    """
    prompt, messages = record.get("prompt"), record.get("messages")
    if isinstance(prompt, str) and prompt.strip() and messages is None:
        return prompt
    if prompt is None and isinstance(messages, list) and messages:
        for message in messages:
            fields = message if isinstance(message, dict) else {}
            if not all(isinstance(fields.get(key), str) for key in ("role", "content")):
                raise PromptError(f"{where}: every message needs the texts `role` and `content`")
        return tuple(messages)
    raise PromptError(f'{where}: either a text "prompt" or a list "messages" required')


def data_digest(prompts: Sequence[Prompt]) -> str:
    """The SHA-256 of prompts, for the manifest."""
    text = json.dumps([p if isinstance(p, str) else [dict(m) for m in p] for p in prompts])
    return hashlib.sha256(text.encode()).hexdigest()


def _parse(line: str, where: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptError(f"{where}: no JSON: {error.msg}") from error
    if not isinstance(record, dict):
        raise PromptError(f"{where}: an object required, got {type(record).__name__}")
    return record


def _dataset_rows(name: str) -> list[Any]:
    try:
        import datasets
    except ImportError as error:
        raise PromptError(f"{name}: no file, and a dataset needs `pip install datasets`") from error
    try:
        rows = datasets.load_dataset(name, split="train", streaming=True, trust_remote_code=False)
        return list(itertools.islice(rows, _FROM_DATASET))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise PromptError(f"{name}: no file, and no dataset that can be read: {reason}") from error
