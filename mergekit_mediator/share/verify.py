"""Verify an artifact on the Hub by the digests that the Hub states."""

from huggingface_hub import HfApi

from mergekit_mediator.errors import ArtifactError
from mergekit_mediator.share.failures import failures
from mergekit_mediator.share.pull import Repository
from mergekit_mediator.store.loaded_files import is_loaded
from mergekit_mediator.store.manifest import (
    Manifest,
    is_router_left_behind,
)


def verify_repository(name: str, revision: str | None = None) -> Manifest:
    """Check every file of an artifact on the Hub against its manifest.

    The Hub states the SHA-256 of large files: these digests are compared. Small files are fetched.

    Args:
        name: `USER/NAME`.
        revision: the repository's branch, tag or commit.

    Returns:
        The manifest.

    Raises:
        ArtifactError: a file is missing or differs, or loading would read a file that the manifest does not
            name. The error names the first such file.
        ShareError: the repository cannot be read.
    """
    repository = Repository.at(name, revision)
    manifest = repository.manifest
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
        is_expected = path in manifest.files or is_router_left_behind(path, manifest)
        if is_loaded(path) and not is_expected:
            raise ArtifactError(
                f"{name}: {path}: the manifest does not name it, but loading would read it: remove it"
            )
    repository.fetch(small)
    return manifest
