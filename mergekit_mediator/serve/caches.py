"""Keys and values are only valid under the mixture that they were computed with: who made which."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mergekit_mediator.errors import MixtureError
from mergekit_mediator.serve.mixture import Mixture

# An attribute of the cache itself, so that copies of it, as of a shared prompt, have it too.
_TAG = "_mediator_rows"
# What calls and outputs name a cache: transformers renamed it in 5.24, and takes the old name still.
NAMES = ("cache", "past_key_values")


def digest(artifact: str, rows: tuple[Mixture, ...]) -> str:
    """A key for caches: 32 hexadecimal digits that differ between artifacts and between mixtures.

    Args:
        artifact: what identifies the artifact.
        rows: the mixtures of a batch's rows, or one for all.
    """
    text = json.dumps([artifact, [row.weights for row in rows]], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def joined(rows: tuple[Mixture, ...]) -> tuple[Mixture, ...]:
    """One mixture where all rows have the same."""
    return rows[:1] if len(set(rows)) == 1 else rows


def given(inputs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call, by either name; None if there is none."""
    return next((inputs[name] for name in NAMES if inputs.get(name) is not None), None)


def made(output: Any) -> Any:
    """The cache in a model's output, by either name; None if there is none."""
    name = next((name for name in NAMES if hasattr(output, name)), "")
    return getattr(output, name, None)


def is_filled(cache: Any) -> bool:
    """Whether a cache holds any token.

    Raises:
        MixtureError: it is not of transformers' classes, so that nothing can be noted in it.
    """
    if cache is None:
        return False
    if not hasattr(cache, "get_seq_length"):
        raise MixtureError(
            f"cache: one of transformers' caches required, got {type(cache).__name__}: use DynamicCache"
        )
    return bool(cache.get_seq_length())


def mark(cache: Any, rows: tuple[Mixture, ...]) -> None:
    """Note with which mixtures the content of a cache is computed."""
    if cache is not None:
        setattr(cache, _TAG, rows)


def rows_of(cache: Any) -> tuple[Mixture, ...]:
    """The mixtures that the content of a cache was computed with.

    Raises:
        MixtureError: that is not known.
    """
    rows: tuple[Mixture, ...] | None = getattr(cache, _TAG, None)
    if rows is None:
        raise MixtureError(
            "cache: it is not known which mixture it was computed with: fill it with this model, or "
            "leave it out"
        )
    return rows


def check(cache: Any, rows: tuple[Mixture, ...]) -> None:
    """Refuse a cache that was filled under another mixture.

    Raises:
        MixtureError: naming both.
    """
    if is_filled(cache) and (found := rows_of(cache)) != rows:
        raise MixtureError(
            f"this cache was computed with {describe(found)} and cannot be used with "
            f"{describe(rows)}: name the same mixture, or leave the cache out"
        )


def describe(rows: tuple[Mixture, ...]) -> str:
    """Mixtures in one line."""
    return " | ".join(dict.fromkeys(map(str, rows)))
