"""Fetch the parts of an artifact on the Hub that are used: the manifest first, then files that it names."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download

from mergekit_mediator.errors import ShareError
from mergekit_mediator.models.sources import is_hub_id
from mergekit_mediator.share.failures import failures
from mergekit_mediator.store.manifest import MANIFEST, Manifest, read_manifest
from mergekit_mediator.store.verification import verify_files


@dataclass(frozen=True)
class Repository:
    """An artifact on the Hub at one commit, in the cache of huggingface_hub.

    Attributes:
        name: the repository, `USER/NAME`.
        root: the cache's directory of this commit, which holds the fetched files.
        manifest: the artifact's manifest.
        options: options of `snapshot_download`, such as `token`, `local_files_only` and `cache_dir`.
    """

    name: str
    root: Path
    manifest: Manifest
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def at(cls, name: str, revision: str | None = None, **options: Any) -> "Repository":
        """Fetch the manifest and check it.

        Args:
            name: the repository, `USER/NAME`.
            revision: a branch, a tag or a commit; None for the main branch.
            options: options of `snapshot_download`.

        Raises:
            ShareError: there is no such repository or revision, the user may not read it, or the Hub cannot
                be reached and the cache does not hold the manifest.
            ArtifactError: the repository holds no artifact.
        """
        if not is_hub_id(name):
            raise ShareError(f"{name}: neither a directory nor a repository: USER/NAME required")
        root = _fetch(name, revision, [MANIFEST], options)
        return cls(name, root, read_manifest(root), options)

    @property
    def commit(self) -> str:
        """The commit of the files, 40 hexadecimal digits."""
        return self.root.name

    def fetch(self, files: Iterable[str], verify: bool = True) -> None:
        """Fetch files that the manifest names.

        Args:
            files: the paths in the repository.
            verify: check the digest of each file.

        Raises:
            ShareError: see `at`.
            ArtifactError: a file is missing, or differs from its digest.
        """
        names = list(files)
        _fetch(self.name, self.commit, names, self.options)
        if verify:
            verify_files(self.root, self.manifest, names)

    def shared_files(self) -> list[str]:
        """List the files that every request needs: all but the experts' files."""
        experts = {f"mediator/{expert.file}" for expert in self.manifest.experts}
        return [name for name in self.manifest.files if name not in experts]


class Location(NamedTuple):
    """An artifact that can be loaded.

    Attributes:
        root: the directory.
        manifest: the manifest.
        fetch: brings an expert's file into the directory; None if all files are there.
    """

    root: Path
    manifest: Manifest
    fetch: Callable[[str], None] | None = None


def find_artifact(
    source: str | Path, revision: str | None = None, verify: bool = True, **options: Any
) -> Location:
    """Find an artifact in a directory; or on the Hub, and fetch all files but the experts' files.

    Args:
        source: a directory, or the name of a repository on the Hub.
        revision: the repository's branch, tag or commit.
        verify: check the digest of every file; this takes as long as reading the files.
        options: options of `snapshot_download`, such as `token`, `local_files_only` and `cache_dir`.

    Raises:
        ArtifactError: there is no artifact, or a file is missing or altered.
        ShareError: the repository cannot be read.
    """
    if Path(source).is_dir():
        root = Path(source)
        manifest = read_manifest(root)
        if verify:
            verify_files(root, manifest)
        return Location(root, manifest)
    repository = Repository.at(str(source), revision, **options)
    repository.fetch(repository.shared_files(), verify)
    return Location(
        repository.root, repository.manifest, lambda name: repository.fetch([name], verify)
    )


def fetch_artifact(source: str | Path, revision: str | None = None) -> tuple[Path, Manifest]:
    """Find an artifact with the files of all experts, and check every digest.

    Args:
        source: a directory, or the name of a repository on the Hub.
        revision: the repository's branch, tag or commit.

    Returns:
        The directory and the manifest.

    Raises:
        ArtifactError: there is no artifact, or a file is missing or altered.
        ShareError: the repository cannot be read.
    """
    root, manifest, fetch = find_artifact(source, revision)
    if fetch is not None:
        for expert in manifest.experts:
            fetch(f"mediator/{expert.file}")
    return root, manifest


def fetch_manifest(source: str | Path, revision: str | None = None) -> Manifest:
    """Read the manifest of an artifact in a directory; or on the Hub, and fetch no other file.

    Args:
        source: a directory, or the name of a repository on the Hub.
        revision: the repository's branch, tag or commit.

    Raises:
        ArtifactError: there is no artifact.
        ShareError: the repository cannot be read.
    """
    if Path(source).is_dir():
        return read_manifest(Path(source))
    return Repository.at(str(source), revision).manifest


def _fetch(
    name: str, revision: str | None, files: Sequence[str], options: Mapping[str, Any]
) -> Path:
    """Fetch files of a repository into the cache; return the cache's directory of the commit."""
    with failures(name, revision, [file for file in files if file != MANIFEST]):
        patterns = [escape(file) for file in files]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, **options))
