"""Publishing an artifact: written beside or in its place, moved there when all is written, the manifest last."""

import os
import shutil
from pathlib import Path

from mergekit_mediator.artifact import MANIFEST, Manifest, files_below, write_manifest
from mergekit_mediator.errors import OutputError


class Staging:
    """A directory that becomes the output when all is written, or vanishes.

    It is beside the output, or inside where that exists already: it may be all that can be written, and
    a file system of its own.

    Use as a context manager; `publish` at the end. An error or interrupt removes what was written.
    """

    def __init__(self, out: Path, overwrite: bool = False) -> None:
        """
        Raises:
            OutputError: the output holds a model and `overwrite` is not set, or cannot be created.
        """
        self.out = out
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out}: is a file: choose another output directory")
        self._replaced = _model_files(out)
        if self._replaced and not overwrite:
            raise OutputError(
                f"{out}: already holds a model ({self._replaced[0]}): choose another directory, or "
                "run `mergekit-mediator merge --overwrite`"
            )
        place = out.resolve()
        parent = place if out.is_dir() else place.parent
        self.path = parent / f".{place.name}.partial-{os.getpid()}"

    def __enter__(self) -> "Staging":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir()
        except OSError as error:
            raise OutputError(
                f"{self.out}: cannot be written in {self.path.parent}: {error.strerror}: choose "
                "another output directory"
            ) from error
        return self

    def __exit__(self, *exception: object) -> None:
        if self.path.exists():
            shutil.rmtree(self.path)

    def publish(self, manifest: Manifest) -> None:
        """Move everything into place, the manifest last."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / MANIFEST).unlink(missing_ok=True)
        for name in self._replaced:
            (self.out / name).unlink(missing_ok=True)
        for name in files_below(self.path):
            (self.out / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.path / name, self.out / name)
        write_manifest(self.out, manifest)


def _model_files(out: Path) -> list[str]:
    """The files of a model that a directory holds already."""
    if not out.is_dir():
        return []
    patterns = ("*.safetensors", "*.bin", "*.index.json", "config.json", "mediator/**/*")
    found = {p.relative_to(out).as_posix() for pattern in patterns for p in out.glob(pattern)}
    return sorted(name for name in found if (out / name).is_file())
