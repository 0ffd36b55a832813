"""The check of files against the digests that a manifest has of them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mergekit_mediator.errors import ArtifactError
from mergekit_mediator.store.digests import digest, digests
from mergekit_mediator.store.loaded_files import loaded_files
from mergekit_mediator.store.manifest import Manifest, is_router_left_behind


def verify_files(root: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Check size and digest of every file that the manifest names, and that loading reads no other file.

    Args:
        root: of the artifact.
        manifest: of the artifact.
        names: the files to check, of those that the manifest names; None for all.

    Raises:
        ArtifactError: a file is missing or differs, or loading would read a file that the manifest does not
            name. The error names the first such file.
    """
    checked = list(manifest.files if names is None else names)
    for name in checked:
        path, expected = root / name, manifest.files[name]
        if not path.is_file():
            raise ArtifactError(f"{path}: missing, but the manifest names it")
        if path.stat().st_size != expected.bytes:
            raise ArtifactError(
                f"{path}: {expected.bytes} bytes required, got {path.stat().st_size}"
            )
    with _reading(root):
        for name in loaded_files(root):
            if name not in manifest.files and not is_router_left_behind(name, manifest):
                raise ArtifactError(
                    f"{root / name}: the manifest does not name it, but loading would read it: remove it"
                )
        read = digests(root, checked)
    for name, actual in read.items():
        if actual != manifest.files[name]:
            raise ArtifactError(
                f"{root / name}: SHA-256 {manifest.files[name].sha256[:12]}… required, got "
                f"{actual.sha256[:12]}…: the file was altered after the merge"
            )


def verify_base(base: Path, manifest: Manifest) -> None:
    """Check that a local directory holds the base model that the artifact was made from.

    Raises:
        ArtifactError: a weight file is missing or differs. The error names the first such file.
    """
    for name, expected in manifest.base.files.items():
        path = base / name
        if not path.is_file():
            raise ArtifactError(
                f"{path}: missing, but a weight file of the base model {manifest.base.source}"
            )
        with _reading(base):
            actual = digest(path)
        if actual != expected:
            raise ArtifactError(
                f"{path}: SHA-256 {expected.sha256[:12]}… required, got {actual.sha256[:12]}…: name the "
                f"directory of the base of this artifact, {manifest.base.source}"
            )


@contextmanager
def _reading(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"{error.filename or root}: cannot be read: {error.strerror or error}"
        ) from error
