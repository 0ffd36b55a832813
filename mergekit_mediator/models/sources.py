"""Where models come from, as configurations name them: repositories on the Hub, or directories."""

import re
from collections.abc import Iterable
from pathlib import Path

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_hub_id(source: str) -> bool:
    """Whether a model's source names a repository on the Hub rather than a local directory."""
    return bool(_HUB_ID.fullmatch(source)) and not Path(source).exists()


def public_name(source: str) -> str:
    """Return a source without the directories of this machine.

    Args:
        source: a repository, a directory, or a model and its adapter as `model+adapter`.
    """
    parts = source.split("+")
    return "+".join(part if is_hub_id(part) else Path(part).name or part for part in parts)


def without_directories(text: str, sources: Iterable[str]) -> str:
    """Replace each local source in a text by its last component."""
    parts = {part for source in sources for part in source.split("+")}
    for local in sorted(filter(None, parts), key=len, reverse=True):
        if not is_hub_id(local):
            text = text.replace(local, Path(local).name or local)
    return text
