"""Tensors that wait on disk until a merge ends."""

import functools
import shutil
import tempfile
import time
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, suppress
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_mediator.errors import OutputError
from mergekit_mediator.store.output_lock import output_lock

_PREFIX = "mergekit-mediator-"
# What the lock stands for; its file is in the temporary directory.
_CONTENT = "tensors"
# A process may be about to lock a file that is younger.
_SECONDS = 60


class Scratch(MutableMapping[str, Tensor]):
    """Tensors by name in a temporary directory, which goes with the last of them or with this object.

    The directory is locked. A process that is killed leaves it behind without the lock, and the next removes it.
    """

    def __init__(self) -> None:
        self._paths: dict[str, Path] = {}
        self._held = ExitStack()

    @functools.cached_property
    def _directory(self) -> "tempfile.TemporaryDirectory[str]":
        _remove_left_behind(Path(tempfile.gettempdir()))
        directory = tempfile.TemporaryDirectory(prefix=_PREFIX)
        self._held.enter_context(output_lock(Path(directory.name, _CONTENT)))
        return directory

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        path = Path(self._directory.name, f"{len(self._paths)}.safetensors")
        self._paths.setdefault(name, path)
        save_file({"tensor": tensor.contiguous().cpu()}, self._paths[name])

    def __getitem__(self, name: str) -> Tensor:
        return load_file(self._paths[name])["tensor"]

    def __delitem__(self, name: str) -> None:
        self._paths.pop(name).unlink()
        if not self._paths:
            self._held.close()
            self._directory.cleanup()
            del self._directory

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def _remove_left_behind(parent: Path) -> None:
    """Remove the directories of processes that were killed: they have the file of a lock that nobody holds."""
    for lock in parent.glob(f"{_PREFIX}*/.{_CONTENT}.*"):
        directory = lock.parent
        with suppress(
            OSError, OutputError
        ):  # another process holds it, has just removed it, or owns it
            if not directory.is_symlink() and time.time() - lock.stat().st_mtime > _SECONDS:
                with output_lock(directory / _CONTENT):
                    shutil.rmtree(directory)
