"""Unknown keys of a configuration file, which mergekit ignores without a word."""

import difflib
from collections.abc import Iterator
from typing import Any

import yaml
from mergekit.config import MergeConfiguration
from pydantic import BaseModel

from mergekit_mediator.errors import ConfigError


def check_keys(source: str, config: MergeConfiguration) -> None:
    """Refuse a configuration whose text has a key that mergekit does not know.

    Args:
        source: the YAML text of the configuration.
        config: mergekit's reading of the text.

    Raises:
        ConfigError: a key is unknown; the message has its place and the nearest key.
    """
    for place, key, fields in _unknown(yaml.safe_load(source), config, ""):
        nearest = difflib.get_close_matches(key, fields, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"use one of {', '.join(fields)}"
        raise ConfigError(f"{place or 'configuration'}: unknown key {key!r}: {hint}")


def _unknown(raw: Any, read: Any, place: str) -> Iterator[tuple[str, str, list[str]]]:
    """Yield for each unknown key its place, the key, and the keys that its place may have."""
    if isinstance(read, BaseModel) and isinstance(raw, dict):
        fields = list(type(read).model_fields)
        for key, value in raw.items():
            if key in fields:
                yield from _unknown(value, getattr(read, key), f"{place}.{key}".lstrip("."))
            else:
                yield place, str(key), fields
    elif isinstance(read, dict) and isinstance(raw, dict):
        for key, value in raw.items():
            yield from _unknown(value, read.get(key), f"{place}.{key}")
    elif isinstance(read, list) and isinstance(raw, list):
        for index, (value, item) in enumerate(zip(raw, read, strict=False)):
            yield from _unknown(value, item, f"{place}[{index}]")
