"""The model card of an artifact that was changed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from mergekit_mediator.merge.card import card_text
from mergekit_mediator.store.manifest import CARD, CONFIG_SOURCE, Manifest
from mergekit_mediator.store.staging_directories import output_name


def renew_card(root: Path, before: Manifest, after: Manifest) -> None:
    """Write the card anew, unless somebody has edited it since this package wrote it.

    Args:
        root: the staging directory, with the card of before.
        before: the manifest that the card of before describes.
        after: the manifest to describe.
    """
    path, source = root / CARD, root / CONFIG_SOURCE
    if not path.is_file() or not source.is_file():
        return
    name, config = output_name(root), source.read_text(encoding="utf-8")
    files = list(_prompts(yaml.safe_load(config)))
    if path.read_text(encoding="utf-8") != card_text(name, before, config, files):
        tqdm.write(
            f"note: {CARD} stays, as it was edited after the merge: describe the change in it"
        )
        return
    path.unlink()  # it may be a second name of the artifact's own file
    path.write_text(card_text(name, after, config, files), encoding="utf-8")


def _prompts(config: Any) -> Iterator[str]:
    """List the files of prompts that a configuration names."""
    if isinstance(config, list):
        for entry in config:
            yield from _prompts(entry)
    elif isinstance(config, dict):
        if isinstance(config.get("prompts"), str):
            yield config["prompts"]
        yield from _prompts(list(config.values()))
