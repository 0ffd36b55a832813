"""Tensors that wait on disk until a merge ends."""

import functools
import tempfile
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


class Scratch(MutableMapping[str, Tensor]):
    """Tensors by name in a temporary directory, which goes with the last of them or with this object."""

    def __init__(self) -> None:
        self._paths: dict[str, Path] = {}

    @functools.cached_property
    def _directory(self) -> "tempfile.TemporaryDirectory[str]":
        return tempfile.TemporaryDirectory(prefix="mergekit-mediator-")

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        path = Path(self._directory.name, f"{len(self._paths)}.safetensors")
        self._paths.setdefault(name, path)
        save_file({"tensor": tensor.contiguous().cpu()}, self._paths[name])

    def __getitem__(self, name: str) -> Tensor:
        return load_file(self._paths[name])["tensor"]

    def __delitem__(self, name: str) -> None:
        self._paths.pop(name).unlink()
        if not self._paths:
            self._directory.cleanup()
            del self._directory

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)
