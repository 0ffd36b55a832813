"""Names, dtypes and shapes of a checkpoint's tensors, read from safetensors headers alone."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mergekit_mediator.errors import InputError, first_line

_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
# A header of more than this is refused by safetensors itself.
_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a checkpoint.

    Attributes:
        dtype: safetensors' name of it, such as `BF16`.
        shape: of the tensor.
        file: the shard that holds it.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * _BYTES.get(self.dtype, 1)


def read_headers(directory: Path, files: Iterable[str]) -> dict[str, TensorHeader]:
    """The tensors of local safetensors files, by name.

    Raises:
        InputError: a file is missing, truncated, outside the directory, or no safetensors file.
    """
    tensors: dict[str, TensorHeader] = {}
    for file in files:
        path = directory / file
        if ".." in Path(file).parts or Path(file).is_absolute():
            raise InputError(f"{directory}: the index names {file!r}, which is outside the model")
        for name, (dtype, shape) in _read_header(path).items():
            tensors[name] = TensorHeader(dtype, shape, file)
    return tensors


def fetch_headers(repo: str, revision: str | None) -> dict[str, TensorHeader]:
    """The tensors of a model on the Hub, by name; downloads the headers only.

    Raises:
        InputError: the model cannot be reached, or is not stored as safetensors.
    """
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError

    # the HTTP client differs between versions of huggingface_hub; its error is a base of theirs
    client_errors = (b for b in HfHubHTTPError.__bases__ if issubclass(b, Exception))
    errors: tuple[type[Exception], ...] = (OSError, NotASafetensorsRepoError, *client_errors)
    try:
        metadata = get_safetensors_metadata(repo, revision=revision)
    except errors as error:
        raise InputError(f"{repo}: headers cannot be fetched: {first_line(error)}") from error
    return {
        name: TensorHeader(info.dtype, tuple(info.shape), file)
        for file, content in metadata.files_metadata.items()
        for name, info in content.tensors.items()
    }


def _read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(_LARGEST_HEADER, size - 8):
                raise InputError(f"{path}: is truncated, or no safetensors file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        required = 8 + length + max((e["data_offsets"][1] for e in header.values()), default=0)
        tensors = {name: (e["dtype"], tuple(e["shape"])) for name, e in header.items()}
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: has a malformed safetensors header: {error}") from error
    if required != size:
        raise InputError(f"{path}: {required} bytes required, got {size}: the file is truncated")
    return tensors
