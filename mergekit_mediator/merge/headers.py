"""The names, dtypes and shapes of a checkpoint's tensors, from safetensors headers alone."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mergekit_mediator.errors import InputError, first_line

_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
# safetensors itself refuses a larger header.
_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorHeader:
    """The header of one tensor.

    Attributes:
        dtype: the name of its dtype in safetensors, such as `BF16`.
        shape: its shape.
        file: the name of the shard that holds it.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def numel(self) -> int:
        """The number of the tensor's elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """The bytes of the tensor's elements."""
        return self.numel * _BYTES.get(self.dtype, 1)


def read_headers(directory: Path, files: Iterable[str]) -> dict[str, TensorHeader]:
    """Read the headers of local safetensors files, by the name of the tensor.

    Args:
        directory: the directory of the model.
        files: the names of its shards.

    Raises:
        InputError: a file is missing, truncated, outside the directory, or no safetensors file.
    """
    tensors: dict[str, TensorHeader] = {}
    for file in files:
        path = directory / file
        if ".." in Path(file).parts or Path(file).is_absolute():
            raise InputError(
                f"{directory}: the index names {file!r}, which is outside the model: download the model anew"
            )
        for name, (dtype, shape) in _read_header(path).items():
            tensors[name] = TensorHeader(dtype, shape, file)
    return tensors


def fetch_headers(repo: str, revision: str | None) -> dict[str, TensorHeader]:
    """Download the headers of a model on the Hub, by the name of the tensor, without its weights.

    Args:
        repo: the repository.
        revision: the revision of the repository; None is the newest.

    Raises:
        InputError: the Hub or the model cannot be reached, or the model has no safetensors files.
    """
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError

    # versions of huggingface_hub differ in their HTTP client; HfHubHTTPError derives from its error
    client_errors = (b for b in HfHubHTTPError.__bases__ if issubclass(b, Exception))
    errors: tuple[type[Exception], ...] = (OSError, NotASafetensorsRepoError, *client_errors)
    try:
        metadata = get_safetensors_metadata(repo, revision=revision)
    except errors as error:
        raise InputError(
            f"{repo}: headers cannot be fetched: {first_line(error)}: check its name and the network"
        ) from error
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
                raise InputError(
                    f"{path}: the file is truncated, or no safetensors file: download it anew"
                )
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        required = 8 + length + max((e["data_offsets"][1] for e in header.values()), default=0)
        tensors = {name: (e["dtype"], tuple(e["shape"])) for name, e in header.items()}
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: the safetensors header is malformed: {error}: download the file anew"
        ) from error
    if required != size:
        raise InputError(
            f"{path}: {required} bytes required, got {size}: the file is truncated: download it anew"
        )
    return tensors
