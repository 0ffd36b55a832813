"""Read the cards of the merged models: licence, languages and datasets."""

import functools
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import constants, get_session, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.repocard import metadata_load
from tqdm import tqdm

from mergekit_mediator.errors import first_line
from mergekit_mediator.store.manifest import BaseEntry, ExpertEntry, Manifest

_SECONDS = 2  # for the Hub to answer
# The HTTP library of huggingface_hub has changed twice; its errors are the first base of the Hub's own.
_UNREACHABLE: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)


def license_of(source: str, revision: str | None = None) -> str | None:
    """Read the licence of a model from its card, under the Hub's name for it, such as `apache-2.0`.

    Args:
        source: a directory, or a repository on the Hub.
        revision: the revision of the repository.

    Returns:
        None if there is no card, if the card cannot be read, or if it states no licence.
    """
    try:
        metadata = _metadata(source, revision)
    except ValueError as error:
        tqdm.write(f"warning: {source}: the model card cannot be read: {first_line(error)}")
        return None
    license = metadata.get("license")
    if license == "other":
        license = metadata.get("license_name", license)
    return license if isinstance(license, str) else None


def stated_by_any(manifest: Manifest, name: str) -> list[str]:
    """List what the cards of base and experts state under a name, such as `language`, each value once.

    Args:
        manifest: the manifest, which names the models.
        name: the name in the metadata; its values are a text or a list of texts.
    """
    values: dict[str, None] = {}
    models: list[BaseEntry | ExpertEntry] = [manifest.base, *manifest.experts]
    for model in models:
        source = model.source.rpartition("+")[2]
        with suppress(ValueError):  # `license_of` has warned of it
            stated = _metadata(source, model.revision).get(name)
            stated = [stated] if isinstance(stated, str) else stated
            if isinstance(stated, list):
                values |= dict.fromkeys(value for value in stated if isinstance(value, str))
    return list(values)


def _metadata(source: str, revision: str | None) -> dict[str, Any]:
    """Read the metadata of a card; empty if there is no card.

    Raises:
        ValueError: the card cannot be read.
    """
    try:
        path = Path(source) / "README.md"
        if not Path(source).is_dir():
            is_offline = not _hub_answers(constants.ENDPOINT)
            path = Path(
                hf_hub_download(source, "README.md", revision=revision, local_files_only=is_offline)
            )
        return dict(metadata_load(path) or {})
    except (OSError, HfHubHTTPError, HFValidationError):
        return {}
    except yaml.YAMLError as error:
        raise ValueError(first_line(error)) from error


@functools.cache
def _hub_answers(endpoint: str) -> bool:
    """Ask the Hub once, because a download without network would try again for half a minute."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(endpoint, timeout=_SECONDS)
    except _UNREACHABLE:
        tqdm.write("warning: the Hub does not answer: licences are those of cached model cards")
        return False
    return True


def disagreement(licenses: Iterable[str | None]) -> str | None:
    """List the licences of models if they differ; None if all models state the same, or none states any."""
    stated = {license or "not stated" for license in licenses}
    if len(stated) == 1:
        return None
    return ", ".join(sorted(stated))
