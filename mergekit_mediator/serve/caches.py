"""Mark caches with the mixtures that computed them: keys and values are valid under no other mixture."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mergekit_mediator.errors import MixtureError
from mergekit_mediator.serve.mixture import Mixture
from mergekit_mediator.store.manifest import RESPONSE, Manifest

# The mark is an attribute of the cache itself, so that a copy of the cache carries it too.
_TAG = "_mediator_rows"
# Calls and outputs use either name: transformers renamed the cache in 5.24 and still takes the old name.
NAMES = ("cache", "past_key_values")


def identity(manifest: Manifest) -> str:
    """Identify an artifact's mixtures by the digests of its weights and configurations, as JSON.

    Router files are left out: they do not change a mixture.
    """
    routers = (manifest.router_file, RESPONSE)
    digests = [
        (name, digest.sha256)
        for name, digest in manifest.files.items()
        if name not in routers and name.endswith((".safetensors", "config.json"))
    ]
    return json.dumps(sorted(digests))


def digest(artifact: str, rows: tuple[Mixture, ...]) -> str:
    """Make a key for caches: 32 hexadecimal digits that differ between artifacts and between mixtures.

    Args:
        artifact: the artifact's `identity`.
        rows: the mixtures of a batch's rows, or one mixture for all rows.
    """
    text = json.dumps([artifact, [row.weights for row in rows]], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def joined(rows: tuple[Mixture, ...]) -> tuple[Mixture, ...]:
    """Join the mixtures of rows to one mixture where all rows have the same."""
    return rows[:1] if len(set(rows)) == 1 else rows


def in_call(inputs: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of a call, by either name; None if there is none."""
    return next((inputs[name] for name in NAMES if inputs.get(name) is not None), None)


def in_output(output: Any) -> Any:
    """Return the cache in a model's output, by either name; None if there is none."""
    name = next((name for name in NAMES if hasattr(output, name)), "")
    return getattr(output, name, None)


def is_filled(cache: Any) -> bool:
    """Tell whether a cache holds any token.

    Raises:
        MixtureError: the cache is not of a class of transformers, so that it cannot be marked.
    """
    if cache is None:
        return False
    if not hasattr(cache, "get_seq_length"):
        raise MixtureError(
            "cache: one of transformers' caches is required, got "
            f"{type(cache).__name__}: use DynamicCache"
        )
    return bool(cache.get_seq_length())


def mark(cache: Any, rows: tuple[Mixture, ...]) -> None:
    """Mark a cache with the mixtures that compute its content; do nothing without a cache."""
    if cache is not None:
        setattr(cache, _TAG, rows)


def rows_of(cache: Any) -> tuple[Mixture, ...]:
    """Return the mixtures that computed the content of a cache.

    Raises:
        MixtureError: the cache has no mark.
    """
    rows: tuple[Mixture, ...] | None = getattr(cache, _TAG, None)
    if rows is None:
        raise MixtureError(
            "cache: this model did not fill it, so that its mixture is unknown: fill the cache with "
            "this model, or leave it out"
        )
    return rows


def check(cache: Any, rows: tuple[Mixture, ...]) -> None:
    """Refuse a cache that was filled under another mixture.

    Raises:
        MixtureError: the mixtures differ; the text names both.
    """
    if is_filled(cache) and (cached := rows_of(cache)) != rows:
        raise MixtureError(
            f"cache: it was computed with {describe(cached)} and cannot be used with "
            f"{describe(rows)}: name the same mixture, or leave the cache out"
        )


def describe(rows: tuple[Mixture, ...]) -> str:
    """Write the different mixtures of rows in one line."""
    return " | ".join(dict.fromkeys(map(str, rows)))
