"""One sparse expert on disk: an ordinary safetensors file, one uint8 entry per weight, written as a stream."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
from safetensors import safe_open
from torch import Tensor

from mergekit_mediator.codec import decode_bytes, encode_bytes
from mergekit_mediator.description import Description, parse_description
from mergekit_mediator.errors import ArtifactError
from mergekit_mediator.sparse import SparseTensor

_FORMAT = "mediator-expert"
_VERSION = 1
# Upper bound of what one weight adds to the header besides its name (twice): offsets and description.
_ENTRY_BYTES = 800


def header_bytes(weights: Sequence[str]) -> int:
    """The room that a file leaves for its header: enough for all weights that may be written."""
    names = sum(2 * len(json.dumps(name)) for name in weights)
    room = 1024 + names + _ENTRY_BYTES * len(weights)
    return room + -room % 8


class ExpertWriter:
    """Writes the weights of one expert as they come, so that no expert is ever held in memory.

    safetensors keeps its header in front of the data and allows blanks after it: room for the header
    is left at the start and filled in by `close`.
    """

    def __init__(self, path: Path, expert: str, weights: Sequence[str]) -> None:
        """
        Args:
            path: of the file to create.
            expert: its name, stored in the header.
            weights: the names of all weights that may be written, which bounds the header.
        """
        self._header_bytes = header_bytes(weights)
        self._expert = expert
        self._entries: dict[str, tuple[int, int, Description]] = {}
        self._end = 0
        self._file: BinaryIO = path.open("xb")
        self._file.seek(8 + self._header_bytes)

    def write(self, weight: str, stored: SparseTensor, dense: Tensor | None = None) -> None:
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
        self._file.write(stream.numpy().data)
        self._entries[weight] = (self._end, self._end + stream.numel(), description)
        self._end += stream.numel()

    def close(self) -> None:
        """Fill in the header and close the file."""
        weights = {name: d.model_dump() for name, (_, _, d) in self._entries.items()}
        metadata = {
            "format": _FORMAT,
            "version": str(_VERSION),
            "expert": self._expert,
            "weights": json.dumps(weights, separators=(",", ":")),
        }
        header: dict[str, Any] = {"__metadata__": metadata}
        for name, (start, end, _) in self._entries.items():
            header[name] = {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        self._file.seek(0)
        self._file.write(self._header_bytes.to_bytes(8, "little"))
        self._file.write(text.ljust(self._header_bytes))
        self._file.truncate(8 + self._header_bytes + self._end)
        self._file.close()

    def abandon(self) -> None:
        """Close the file without making it readable."""
        self._file.close()


class ExpertFile:
    """A stored expert, memory-mapped: weights are read one by one, when they are asked for."""

    def __init__(self, path: Path) -> None:
        """Read and check the header.

        Raises:
            ArtifactError: the file is missing, truncated, of another format, or inconsistent.
        """
        self.path = path
        try:
            opened: Any = safe_open(path, framework="pt")
            self._file = opened.__enter__()
            metadata = self._file.metadata() or {}
            fields = json.loads(metadata.get("weights", "null"))
        except (OSError, safetensors.SafetensorError, ValueError) as error:
            raise ArtifactError(f"{path}: cannot be read as a sparse expert: {error}") from error
        if metadata.get("format") != _FORMAT or metadata.get("version") != str(_VERSION):
            raise ArtifactError(
                f"{path}: format {_FORMAT!r} version {_VERSION} required, got "
                f"{metadata.get('format')!r} version {metadata.get('version')!r}"
            )
        if not isinstance(fields, dict) or set(fields) != set(self._file.keys()):
            raise ArtifactError(
                f"{path}: the stored weights are not those that its header describes"
            )
        self.expert = metadata.get("expert", "")
        self.weights = {
            name: parse_description(entry, f"{path}: {name!r}") for name, entry in fields.items()
        }

    def read(self, weight: str, dense: Tensor | None = None) -> SparseTensor:
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
