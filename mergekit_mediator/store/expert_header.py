"""The header of an expert file: which weights it holds, and how each is stored. No torch is imported."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors import safe_open

from mergekit_mediator.errors import ArtifactError
from mergekit_mediator.store.description import Description, parse_description
from mergekit_mediator.store.manifest import ExpertEntry
from mergekit_mediator.store.streams import unpack

FORMAT = "mediator-expert"
VERSION = 2
# The entry that describes all others.
DESCRIPTIONS = "__descriptions__"
# A description takes at most so many bytes besides the name of its weight.
_LARGEST_DESCRIPTION = 1024


class ExpertHeader:
    """The header of an expert file, checked; its weights stay on disk.

    Attributes:
        path: of the file.
        expert: the name of the expert.
        weights: the descriptions of the stored weights, by the name of the weight.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        framework: str = "numpy",
    ) -> None:
        """Read and check the header.

        Args:
            path: of the file.
            shapes: of the dense checkpoint's weights, by name. They bound the memory that decoding
                takes; with None the shapes in the file count.
            framework: the library whose arrays safetensors makes of the entries: `numpy` or `pt`.

        Raises:
            ArtifactError: the file is missing, truncated, of another format, or inconsistent.
        """
        self.path = path
        try:
            opened: Any = safe_open(path, framework=framework)
            self._file = opened.__enter__()
            metadata = self._file.metadata() or {}
        except (OSError, safetensors.SafetensorError, ValueError) as error:
            raise ArtifactError(f"{path}: cannot be read as an expert file: {error}") from error
        if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
            raise ArtifactError(
                f"{path}: format {FORMAT!r} version {VERSION} required, got "
                f"{metadata.get('format')!r} version {metadata.get('version')!r}"
            )
        names = set(self._file.keys())
        for name in names:
            self._check_entry(name, shapes)
        names.discard(DESCRIPTIONS)
        fields = self._descriptions(metadata.get("descriptions_bytes", ""), names)
        if set(fields) != names:
            raise ArtifactError(f"{path}: its entries and its descriptions name different weights")
        self.expert: str = metadata.get("expert", "")
        self.weights: dict[str, Description] = {
            name: parse_description(entry, f"{path}: {name!r}", shapes[name] if shapes else None)
            for name, entry in fields.items()
        }

    def check_expert(self, entry: ExpertEntry) -> None:
        """Refuse the file of another expert than the manifest says.

        Raises:
            ArtifactError: the file holds another expert.
        """
        if self.expert != entry.name:
            raise ArtifactError(f"{self.path}: holds expert {self.expert!r}, not {entry.name!r}")

    def stored_bytes(self, weight: str) -> int:
        """Read the bytes of one weight in the file from the header."""
        return int(self._file.get_slice(weight).get_shape()[0])

    def _check_entry(self, name: str, shapes: Mapping[str, tuple[int, ...]] | None) -> None:
        where = f"{self.path}: {name!r}"
        if shapes is not None and name not in shapes and name != DESCRIPTIONS:
            raise ArtifactError(f"{where}: the dense checkpoint has no such weight")
        header = self._file.get_slice(name)
        dtype, shape = header.get_dtype(), header.get_shape()
        if dtype != "U8" or len(shape) != 1:
            raise ArtifactError(f"{where}: a stream of bytes required, got {dtype} {shape}")

    def _descriptions(self, size: str, names: Collection[str]) -> dict[str, Any]:
        """The descriptions of the stored weights as JSON has them; the number of names bounds their size."""
        where = f"{self.path}: {DESCRIPTIONS}"
        most = 2 + sum(len(json.dumps(name)) + _LARGEST_DESCRIPTION for name in names)
        try:
            stored, decoded = np.asarray(self._file.get_tensor(DESCRIPTIONS)), int(size)
            if not 0 <= decoded <= most:
                raise ArtifactError(
                    f"{where}: {stored.size} bytes cannot hold {decoded}: {len(names)} weights are "
                    f"described in at most {most}"
                )
            fields = json.loads(unpack(stored, decoded, where).tobytes())
        except (safetensors.SafetensorError, ValueError, RecursionError) as error:
            raise ArtifactError(f"{where}: cannot be read: {error}") from error
        if not isinstance(fields, dict):
            raise ArtifactError(f"{where}: an object required, got {type(fields).__name__}")
        return fields


def open_header(root: Path, entry: ExpertEntry) -> ExpertHeader:
    """Open the header of an expert's file.

    Args:
        root: of the artifact.
        entry: of the expert in the manifest.

    Raises:
        ArtifactError: the header cannot be read, or the file holds another expert.
    """
    header = ExpertHeader(root / "mediator" / entry.file)
    header.check_expert(entry)
    return header
