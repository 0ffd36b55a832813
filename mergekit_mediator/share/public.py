"""The files of an artifact for other people, without paths and secrets of this machine."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mergekit_mediator.errors import ShareError
from mergekit_mediator.models.sources import public_name, without_directories
from mergekit_mediator.store.digests import FileDigest, digest_of
from mergekit_mediator.store.evaluation import read_evaluation
from mergekit_mediator.store.manifest import (
    CARD,
    CONFIG_SOURCE,
    EVALUATION,
    MANIFEST,
    PICTURES,
    Manifest,
    manifest_text,
)

# The texts that are searched for secrets. A vocabulary is not searched: it may hold such strings as words.
_LARGEST_TEXT = 1 << 20
_TEXTS = (".json", ".md", ".yml", ".yaml", ".jinja", ".py", ".txt")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")
_HOME = re.compile(r"(?:/home/|/Users/|/root/|[A-Z]:\\\\?Users\\\\?)[\w.-]+")


def public_files(root: Path, manifest: Manifest) -> dict[str, Path | bytes]:
    """Collect the files that a push sends, by their paths in the repository.

    The configuration and the manifest name models. The last component takes the place of each directory,
    and the manifest vouches for the configuration that is sent.

    Args:
        root: the artifact's directory.
        manifest: the artifact's manifest.

    Raises:
        ShareError: a text names a token of the Hub, or a home directory.
        ArtifactError: the record of the artifact's evaluation is damaged.
    """
    files: dict[str, Path | bytes] = {name: root / name for name in manifest.files}
    additions = [CARD, *PICTURES]
    if read_evaluation(root, manifest) is not None:
        additions.append(EVALUATION)
    files |= {name: root / name for name in additions if (root / name).is_file()}
    sources = [manifest.base.source, *(expert.source for expert in manifest.experts)]
    digests = dict(manifest.files)
    if CONFIG_SOURCE in files:
        text = (root / CONFIG_SOURCE).read_text(encoding="utf-8")
        sources += _local_paths(yaml.safe_load(text))
        public = without_directories(text, sources).encode()
        files[CONFIG_SOURCE], digests[CONFIG_SOURCE] = public, digest_of(public)
    files[MANIFEST] = manifest_text(_public(manifest, digests)).encode()
    for name, content in files.items():
        _check(root, name, content)
    return files


def _public(manifest: Manifest, files: Mapping[str, FileDigest]) -> Manifest:
    """Replace the directories in a manifest by their last components, and its digests by these."""
    base = manifest.base.model_copy(update={"source": public_name(manifest.base.source)})
    experts = tuple(
        expert.model_copy(update={"source": public_name(expert.source)})
        for expert in manifest.experts
    )
    return manifest.model_copy(update={"base": base, "experts": experts, "files": dict(files)})


def _local_paths(value: Any) -> list[str]:
    """List the strings of a configuration that are absolute paths, or that name an existing file or directory."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        return [path for item in value for path in _local_paths(item)]
    if not isinstance(value, str) or "\n" in value:
        return []
    path = Path(value).expanduser()
    return [value] if path.is_absolute() or path.exists() else []


def _check(root: Path, name: str, content: Path | bytes) -> None:
    """Refuse a text that holds a token, or names a home directory.

    Raises:
        ShareError: there is such a line; the error names the first one.
    """
    if not name.endswith(_TEXTS) or Path(name).name in _VOCABULARIES:
        return
    if isinstance(content, Path):
        if content.stat().st_size > _LARGEST_TEXT:
            return
        content = content.read_bytes()
    for number, line in enumerate(content.decode(errors="replace").splitlines(), start=1):
        if _TOKEN.search(line):
            raise ShareError(
                f"{root / name}: line {number} holds a token of the Hub: remove it, and revoke the token"
            )
        if path := _HOME.search(line):
            raise ShareError(
                f"{root / name}: line {number} names a directory of this machine, {path[0]}: remove it"
            )
