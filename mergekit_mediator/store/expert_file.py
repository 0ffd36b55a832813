"""One expert on disk: an ordinary safetensors file with a uint8 entry for each weight, written as a stream."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import zstandard
from torch import Tensor

from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.store.codec import decode_bytes, encode_bytes
from mergekit_mediator.store.description import Description
from mergekit_mediator.store.expert_header import DESCRIPTIONS, FORMAT, VERSION, ExpertHeader
from mergekit_mediator.store.manifest import ExpertEntry

# The bytes of a weight in the header and the descriptions besides its name, with `bits`, `budget` or `keep`, about.
_ENTRY_BYTES = 120
_COPY_BYTES = 1 << 24
_LEVEL = 15  # of the descriptions: 19 takes four times as long for 0.4% of their bytes


def header_bytes(weights: Sequence[str]) -> int:
    """Estimate the bytes of a file's header and descriptions.

    Args:
        weights: the names of the stored weights.
    """
    return 400 + sum(len(json.dumps(name)) + _ENTRY_BYTES for name in weights)


class ExpertWriter:
    """Writes the weights of one expert one by one, so that no expert is in memory as a whole.

    The header of safetensors precedes the data. So the data goes to a nameless file beside the expert's file
    first, and `close` writes both.
    """

    def __init__(self, path: Path, expert: str) -> None:
        """Open the nameless file.

        Args:
            path: of the file to create.
            expert: the name of the expert, for the header.
        """
        self._path, self._expert = path, expert
        self._entries: dict[str, tuple[int, int, Description]] = {}
        self._end = 0
        self._data: IO[bytes] = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115

    def write(self, weight: str, stored: StoredWeight, dense: Tensor | None = None) -> None:
        """Encode and append one weight.

        Args:
            weight: its name.
            stored: the stored form.
            dense: the dense expert's weight. With it, exact values take about half the bytes, and reading
                them takes the same weight.
        """
        self.append(weight, *encode_bytes(stored, dense))

    def append(self, weight: str, stream: Tensor, description: Description) -> None:
        """Append one encoded weight.

        Args:
            weight: its name.
            stream: `[bytes]` uint8, from `encode_bytes`.
            description: from `encode_bytes`.
        """
        self._data.write(stream.numpy().data)
        self._entries[weight] = (self._end, self._end + stream.numel(), description)
        self._end += stream.numel()

    def close(self) -> None:
        """Write the file: header, weights and their descriptions.

        Raises:
            FileExistsError: the file exists.
        """
        descriptions = {
            name: d.model_dump(exclude_defaults=True) for name, (_, _, d) in self._entries.items()
        }
        plain = json.dumps(descriptions, separators=(",", ":")).encode()
        stored = min(plain, zstandard.ZstdCompressor(level=_LEVEL).compress(plain), key=len)
        self._data.write(stored)
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "expert": self._expert,
            "descriptions_bytes": str(len(plain)),
        }
        header: dict[str, Any] = {"__metadata__": metadata}
        places = {name: (start, end) for name, (start, end, _) in self._entries.items()}
        places[DESCRIPTIONS] = (self._end, self._end + len(stored))
        for name, (start, end) in places.items():
            header[name] = {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text = text.ljust(len(text) + -len(text) % 8)
        with self._path.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            self._data.seek(0)
            shutil.copyfileobj(self._data, file, _COPY_BYTES)
        self._data.close()

    def abandon(self) -> None:
        """Remove the nameless file; no expert file is written."""
        self._data.close()


class ExpertFile(ExpertHeader):
    """A stored expert, memory-mapped: each weight is read when a caller asks for it."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        """Read and check the header; see `ExpertHeader`."""
        super().__init__(path, shapes, framework="pt")

    def read(self, weight: str, dense: Tensor | None = None) -> StoredWeight:
        """Decode one weight.

        Args:
            weight: its name.
            dense: the dense expert's weight in the dtype of its checkpoint. It is required if
                `weights[weight].relative`.

        Raises:
            ArtifactError: the bytes do not fit the description, or the dense weight is missing or another.
        """
        return decode_bytes(
            self.stream(weight), self.weights[weight], f"{self.path}: {weight!r}", dense
        )

    def stream(self, weight: str) -> Tensor:
        """Read the bytes of one weight as they are stored, `[bytes]` uint8."""
        stream: Tensor = self._file.get_tensor(weight)
        return stream


def open_expert(
    root: Path, entry: ExpertEntry, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> ExpertFile:
    """Open an expert's file, memory-mapped.

    Args:
        root: of the artifact.
        entry: of the expert in the manifest.
        shapes: of the dense checkpoint's weights; see `ExpertHeader`.

    Raises:
        ArtifactError: the file cannot be read, or holds another expert.
    """
    file = ExpertFile(root / "mediator" / entry.file, shapes)
    file.check_expert(entry)
    return file
