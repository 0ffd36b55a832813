"""Fetches of an artifact on the Hub what is used: first its manifest, then files that the manifest names."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from huggingface_hub import snapshot_download

from mergekit_mediator.errors import ShareError
from mergekit_mediator.models.sources import is_hub_id
from mergekit_mediator.share.failures import failures
from mergekit_mediator.store.manifest import (
    MANIFEST,
    Manifest,
    read_manifest,
    verify_files,
)


@dataclass(frozen=True)
class Repository:
    """An artifact on the Hub at one commit, in the cache of huggingface_hub.

    Attributes:
        name: of the repository.
        root: the directory of the cache where its files are; those that were fetched.
        manifest: of the artifact.
    """

    name: str
    root: Path
    manifest: Manifest

    @classmethod
    def at(cls, name: str, revision: str | None = None) -> "Repository":
        """Fetch the manifest, and check it before anything that it names is fetched.

        Args:
            name: `USER/NAME`.
            revision: a branch, a tag or a commit; None for the main branch.

        Raises:
            ShareError: there is no such repository or revision, it may not be read, or the Hub cannot
                be reached and the cache does not hold it.
            ArtifactError: it holds no artifact.
        """
        if not is_hub_id(name):
            raise ShareError(f"{name}: neither a directory nor a repository: USER/NAME required")
        root = _fetch(name, revision, [MANIFEST])
        return cls(name, root, read_manifest(root))

    @property
    def commit(self) -> str:
        """The commit that the files are of."""
        return self.root.name

    def fetch(self, files: Iterable[str], verify: bool = True) -> None:
        """Fetch files that the manifest names, and check the digest of each.

        Raises:
            ShareError: see `at`.
            ArtifactError: a file is not there, or is not as the manifest says.
        """
        names = list(files)
        _fetch(self.name, self.commit, names)
        if verify:
            verify_files(self.root, self.manifest, names)

    def shared_files(self) -> list[str]:
        """The files that every request needs: all but the experts'."""
        experts = {f"mediator/{expert.file}" for expert in self.manifest.experts}
        return [name for name in self.manifest.files if name not in experts]


def _fetch(name: str, revision: str | None, files: Sequence[str]) -> Path:
    with failures(name, revision):
        patterns = [escape(file) for file in files]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
