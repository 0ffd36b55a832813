"""Files of prompts: one JSON object per line, or a dataset that the library `datasets` loads."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from reprlib import repr as short
from typing import Any

from mergekit_mediator.errors import PromptError, first_line
from mergekit_mediator.models.prompts import Prompt

# Fewer prompts of an expert do not show how people word its task.
MIN_PROMPTS = 5
# Rows that are read of a dataset. More prompts of the same wordings do not help: docs/results/routers.md.
_DATASET_ROWS = 200

Record = Mapping[str, Any]


def read_prompts(source: Path) -> list[Prompt]:
    """Read prompts: `{"prompt": "..."}` or `{"messages": [{"role": ..., "content": ...}]}`.

    Args:
        source: a file with one such object per line. Or a dataset that `datasets.load_dataset` takes, a
            directory or a name on the Hub; the first 200 rows of its split `train` are read.

    Raises:
        PromptError: the source cannot be read or holds fewer than 5 prompts, or a line has another form.
    """
    if source.is_file() or source.suffix:
        records = read_records(source)
    else:
        rows = _dataset_rows(str(source))
        records = [(f"{source} row {i}", row) for i, row in enumerate(rows, start=1)]
    prompts = [parse_prompt(record, where) for where, record in records]
    if len(prompts) < MIN_PROMPTS:
        raise PromptError(
            f"{source}: at least {MIN_PROMPTS} prompts required, got {len(prompts)}: add prompts"
        )
    return prompts


def read_records(path: Path) -> list[tuple[str, Record]]:
    """Read a file with one JSON object per line. Blank lines are ignored.

    Returns:
        For each object, its place (`PATH line N`, for error messages) and the object.

    Raises:
        PromptError: the file cannot be read, or a line is not a JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path}: cannot be read: {error}") from error
    lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return [(f"{path} line {i}", _parse(line, f"{path} line {i}")) for i, line in lines]


def parse_prompt(record: Record, where: str) -> Prompt:
    """Return the prompt of an object with either a text `prompt` or a list `messages`.

    Args:
        record: the object.
        where: its place, for error messages.

    Raises:
        PromptError: the object has neither or both, or a message has no role or content.
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
    raise PromptError(
        f'{where}: either a text "prompt" or a list "messages" required, not empty, got an object with '
        f"the keys {short(list(record))}"
    )


def data_digest(prompts: Sequence[Prompt]) -> str:
    """Return the SHA-256 of prompts in hexadecimal digits, for the manifest."""
    text = json.dumps([p if isinstance(p, str) else [dict(m) for m in p] for p in prompts])
    return hashlib.sha256(text.encode()).hexdigest()


def _parse(line: str, where: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptError(
            f"{where}: no JSON: {error.msg}: write one object on each line"
        ) from error
    if not isinstance(record, dict):
        raise PromptError(f"{where}: an object required, got {type(record).__name__}")
    return record


def _dataset_rows(name: str) -> list[Any]:
    try:
        import datasets
    except ImportError as error:
        raise PromptError(
            f"{name}: no file, and datasets need another package: `pip install datasets`"
        ) from error
    try:
        rows = datasets.load_dataset(name, split="train", streaming=True, trust_remote_code=False)
        return list(itertools.islice(rows, _DATASET_ROWS))
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise PromptError(f"{name}: no file, and no dataset that can be read: {reason}") from error
