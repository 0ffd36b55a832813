"""The licence that a model's card states."""

from pathlib import Path

import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.repocard import metadata_load
from tqdm import tqdm

from mergekit_mediator.headers import first_line


def license_of(source: str, revision: str | None = None) -> str | None:
    """As the Hub names it, such as `apache-2.0`; None without a card, or where the card does not say.

    Args:
        source: a directory, or a repository on the Hub.
        revision: of the repository.
    """
    try:
        local = Path(source) / "README.md"
        if not Path(source).is_dir():
            local = Path(hf_hub_download(source, "README.md", revision=revision))
        metadata = metadata_load(local) or {}
    except (OSError, HfHubHTTPError, HFValidationError):
        return None
    except (ValueError, yaml.YAMLError) as error:
        tqdm.write(f"warning: {source}: the model card cannot be read: {first_line(error)}")
        return None
    stated = metadata.get("license")
    if stated == "other":
        stated = metadata.get("license_name", stated)
    return stated if isinstance(stated, str) else None
