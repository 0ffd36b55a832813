"""Verifies an artifact where it is: a directory by its bytes, a repository by the digests that the Hub states."""

from pathlib import Path

from huggingface_hub import HfApi

from mergekit_mediator.errors import ArtifactError
from mergekit_mediator.share.failures import failures
from mergekit_mediator.share.pull import Repository
from mergekit_mediator.store.loaded_files import is_loaded
from mergekit_mediator.store.manifest import (
    Manifest,
    is_router_left_behind,
    read_manifest,
    verify_files,
)


def verify_artifact(source: str, revision: str | None = None) -> Manifest:
    """Check every file of an artifact against its manifest, and give the manifest.

    Args:
        source: a directory, or a repository on the Hub.
        revision: of the repository.

    Raises:
        ArtifactError: a file is missing or differs, or loading would read one that is not named.
        ShareError: the repository cannot be read.
    """
    if Path(source).is_dir():
        manifest = read_manifest(Path(source))
        verify_files(Path(source), manifest)
        return manifest
    repository = Repository.at(source, revision)
    _verify_repository(repository)
    return repository.manifest


def _verify_repository(repository: Repository) -> None:
    """The Hub names large files by their SHA-256: they are compared. Small ones are fetched."""
    manifest, name = repository.manifest, repository.name
    with failures(name):
        info = HfApi().model_info(name, revision=repository.commit, files_metadata=True)
    present = {file.rfilename: file for file in info.siblings or []}
    small = []
    for path, expected in manifest.files.items():
        if path not in present:
            raise ArtifactError(f"{name}: {path}: missing, but the manifest names it")
        stored = present[path].lfs
        if stored is None:
            small.append(path)
        elif (stored.sha256, stored.size) != (expected.sha256, expected.bytes):
            raise ArtifactError(
                f"{name}: {path}: SHA-256 {expected.sha256[:12]}… required, got "
                f"{stored.sha256[:12]}…: the file was altered after the merge"
            )
    for path in present:
        named = path in manifest.files or is_router_left_behind(path, manifest)
        if is_loaded(path) and not named:
            raise ArtifactError(
                f"{name}: {path}: the manifest does not name it, but loading would read it: remove it"
            )
    repository.fetch(small)
