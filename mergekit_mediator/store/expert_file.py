"""One sparse expert on disk: an ordinary safetensors file, one uint8 entry per weight, written as a stream."""

import json
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import safetensors
import zstandard
from safetensors import safe_open
from torch import Tensor

from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.errors import ArtifactError
from mergekit_mediator.store.codec import decode_bytes, encode_bytes
from mergekit_mediator.store.description import Description, parse_description
from mergekit_mediator.store.streams import unpack

_FORMAT = "mediator-expert"
_VERSION = 2
# The entry that describes all others.
DESCRIPTIONS = "__descriptions__"
# What a weight within `bits` or a `budget` adds to the header and to the descriptions besides its name, about.
_ENTRY_BYTES = 120
# One description takes no more than this besides the weight's name.
_LARGEST_DESCRIPTION = 1024
_COPY_BYTES = 1 << 24


def header_bytes(weights: Sequence[str]) -> int:
    """The size of a file's header and descriptions, about."""
    return 400 + sum(len(json.dumps(name)) + _ENTRY_BYTES for name in weights)


class ExpertWriter:
    """Writes the weights of one expert as they come, so that no expert is ever held in memory.

    safetensors keeps its header in front of the data: what comes waits in a nameless file beside the
    expert's, which `close` writes.
    """

    def __init__(self, path: Path, expert: str) -> None:
        """
        Args:
            path: of the file to create.
            expert: its name, stored in the header.
        """
        self._path, self._expert = path, expert
        self._entries: dict[str, tuple[int, int, Description]] = {}
        self._end = 0
        self._data: IO[bytes] = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115

    def write(self, weight: str, stored: StoredWeight, dense: Tensor | None = None) -> None:
        """Append one weight.

        Args:
            weight: its name.
            stored: what to store of it.
            dense: the dense expert's weight. Exact values are stored relative to it if it is given, in
                about half the bytes, and can then be read only with it.
        """
        self.append(weight, *encode_bytes(stored, dense))

    def append(self, weight: str, stream: Tensor, description: Description) -> None:
        """Append one weight that is encoded already; see `encode_bytes`."""
        self._data.write(stream.numpy().data)
        self._entries[weight] = (self._end, self._end + stream.numel(), description)
        self._end += stream.numel()

    def close(self) -> None:
        """Write the file: header, then what has come, then its descriptions."""
        descriptions = {
            name: d.model_dump(exclude_defaults=True) for name, (_, _, d) in self._entries.items()
        }
        plain = json.dumps(descriptions, separators=(",", ":")).encode()
        stored = min(plain, zstandard.ZstdCompressor(level=19).compress(plain), key=len)
        self._data.write(stored)
        metadata = {
            "format": _FORMAT,
            "version": str(_VERSION),
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
        """Drop what has come."""
        self._data.close()


class ExpertFile:
    """A stored expert, memory-mapped: weights are read one by one, when they are asked for."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        """Read and check the header.

        Args:
            path: of the file.
            shapes: of the dense checkpoint's weights, which bound what is decoded; None to trust the file.

        Raises:
            ArtifactError: the file is missing, truncated, of another format, or inconsistent.
        """
        self.path = path
        try:
            opened: Any = safe_open(path, framework="pt")
            self._file = opened.__enter__()
            metadata = self._file.metadata() or {}
        except (OSError, safetensors.SafetensorError, ValueError) as error:
            raise ArtifactError(f"{path}: cannot be read as a sparse expert: {error}") from error
        if metadata.get("format") != _FORMAT or metadata.get("version") != str(_VERSION):
            raise ArtifactError(
                f"{path}: format {_FORMAT!r} version {_VERSION} required, got "
                f"{metadata.get('format')!r} version {metadata.get('version')!r}"
            )
        names = set(self._file.keys())
        for name in names:
            self._check_entry(name, shapes)
        names.discard(DESCRIPTIONS)
        fields = self._descriptions(metadata.get("descriptions_bytes", ""), names)
        if set(fields) != names:
            raise ArtifactError(f"{path}: the stored weights are not those that it describes")
        self.expert = metadata.get("expert", "")
        self.weights = {
            name: parse_description(entry, f"{path}: {name!r}", shapes[name] if shapes else None)
            for name, entry in fields.items()
        }

    def read(self, weight: str, dense: Tensor | None = None) -> StoredWeight:
        """Decode one weight.

        Args:
            weight: its name.
            dense: the dense expert's weight in the dtype of its checkpoint; needed where
                `weights[weight].relative`, ignored elsewhere.

        Raises:
            ArtifactError: its bytes do not fit its description, or the dense weight is missing or another.
        """
        stream = self._file.get_tensor(weight)
        return decode_bytes(stream, self.weights[weight], f"{self.path}: {weight!r}", dense)

    def stored_bytes(self, weight: str) -> int:
        """The bytes that one weight takes in the file."""
        return int(self._file.get_slice(weight).get_shape()[0])

    def _check_entry(self, name: str, shapes: Mapping[str, tuple[int, ...]] | None) -> None:
        where = f"{self.path}: {name!r}"
        if shapes is not None and name not in shapes and name != DESCRIPTIONS:
            raise ArtifactError(f"{where}: stored here, but not in the dense checkpoint")
        header = self._file.get_slice(name)
        dtype, shape = header.get_dtype(), header.get_shape()
        if dtype != "U8" or len(shape) != 1:
            raise ArtifactError(f"{where}: a stream of bytes required, got {dtype} {shape}")

    def _descriptions(self, size: str, names: Collection[str]) -> dict[str, Any]:
        """The descriptions of the stored weights as JSON has them; their number bounds what is decoded."""
        where = f"{self.path}: {DESCRIPTIONS}"
        most = 2 + sum(len(json.dumps(name)) + _LARGEST_DESCRIPTION for name in names)
        try:
            stored, decoded = self._file.get_tensor(DESCRIPTIONS).numpy(), int(size)
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
