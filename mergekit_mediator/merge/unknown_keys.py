"""Keys of a configuration file that mergekit does not know, and would pass over in silence."""

import difflib
from collections.abc import Iterator
from typing import Any

import yaml
from mergekit.config import MergeConfiguration
from pydantic import BaseModel

from mergekit_mediator.errors import ConfigError


def check_keys(source: str, config: MergeConfiguration) -> None:
    """Refuse what is in a configuration's text but not in what mergekit read of it.

    Args:
        source: YAML.
        config: what mergekit read in it.

    Raises:
        ConfigError: naming the first unknown key, where it stands, and the nearest known one.
    """
    for place, key, known in _unknown(yaml.safe_load(source), config, ""):
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        raise ConfigError(f"{place or 'configuration'}: unknown key {key!r}: {hint}")


def _unknown(raw: Any, read: Any, place: str) -> Iterator[tuple[str, str, list[str]]]:
    """The place of every unknown key, the key, and those that are known there."""
    if isinstance(read, BaseModel) and isinstance(raw, dict):
        known = list(type(read).model_fields)
        for key, value in raw.items():
            if key in known:
                yield from _unknown(value, getattr(read, key), f"{place}.{key}".lstrip("."))
            else:
                yield place, str(key), known
    elif isinstance(read, dict) and isinstance(raw, dict):
        for key, value in raw.items():
            yield from _unknown(value, read.get(key), f"{place}.{key}")
    elif isinstance(read, list) and isinstance(raw, list):
        for index, (value, of_read) in enumerate(zip(raw, read, strict=False)):
            yield from _unknown(value, of_read, f"{place}[{index}]")
