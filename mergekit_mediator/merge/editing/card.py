"""The model card of an artifact that was changed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from mergekit_mediator.merge.card import new_card
from mergekit_mediator.store.card import generated_part, with_generated
from mergekit_mediator.store.manifest import CARD, CONFIG_SOURCE, Manifest
from mergekit_mediator.store.staging_directories import output_name


def renew_card(root: Path, before: Manifest, after: Manifest) -> None:
    """Write the card anew. Of a card that people edited, write the generated part anew; a note says so.

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
    text, new = path.read_text(encoding="utf-8"), new_card(name, after, config, files)
    if with_generated(text, "") != with_generated(new_card(name, before, config, files), ""):
        tqdm.write(
            f"note: {CARD} was edited after the merge: describe the change in its other parts"
        )
        edited = with_generated(text, generated_part(after))
        if edited is None:
            return
        new = edited
    path.unlink()  # it may be a second name of the artifact's own file
    path.write_text(new, encoding="utf-8")


def _prompts(config: Any) -> Iterator[str]:
    """List the files of prompts that a configuration names."""
    if isinstance(config, list):
        for entry in config:
            yield from _prompts(entry)
    elif isinstance(config, dict):
        if isinstance(config.get("prompts"), str):
            yield config["prompts"]
        yield from _prompts(list(config.values()))
