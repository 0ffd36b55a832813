"""One safetensors file for each router: tensors, and a JSON object in the header. No pickle."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_mediator.errors import ArtifactError, OutputError
from mergekit_mediator.store import durable

_KEY = "mediator_router"
_VERSION = 1
# The JSON object takes at most so many bytes, and so many more for each tensor.
_ABOUT_BYTES = 1 << 16
_ABOUT_BYTES_PER_TENSOR = 1 << 10
_LONGEST_LIST = 500  # letters of a list of names in an error message
_DTYPES = {"U8": torch.uint8, "I64": torch.int64, "F32": torch.float32}


def save_tensors(
    path: Path, kind: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]
) -> None:
    """Write a router beside its place, then move it into place in one step.

    Args:
        path: of the router, where an older one may be.
        kind: of the router.
        tensors: by name, on any device.
        about: the entries of the JSON object.

    Raises:
        OutputError: the file cannot be written.
    """
    header = {"format_version": _VERSION, "kind": kind, **about}
    unfinished = path.with_name(path.name + ".partial")
    try:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            unfinished,
            metadata={_KEY: json.dumps(header, sort_keys=True, allow_nan=False)},
        )
        durable.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path}: the router cannot be written: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


class RouterFile:
    """A router on disk, memory-mapped. A caller checks the header of a tensor before it reads the tensor.

    Attributes:
        names: of the tensors.
        about: the JSON object.
    """

    def __init__(self, path: Path, kind: str) -> None:
        """Read and check the header.

        Args:
            path: of the router.
            kind: that the router must have.

        Raises:
            ArtifactError: the file is missing, damaged, or of another kind or version.
        """
        self._path = path
        try:
            opened: Any = safe_open(path, framework="pt")
            self._file = opened.__enter__()
            text = (self._file.metadata() or {}).get(_KEY, "")
            self.names = frozenset(self._file.keys())
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{path}: the router cannot be read: {error}") from error
        most = _ABOUT_BYTES + _ABOUT_BYTES_PER_TENSOR * len(self.names)
        if len(text) > most:
            raise ArtifactError(
                f"{path}: {_KEY!r} of at most {most} bytes required, got {len(text)}"
            )
        try:
            about = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{path}: no router: its header has no JSON {_KEY!r}") from error
        if not isinstance(about, dict) or about.get("kind") != kind:
            got = about.get("kind") if isinstance(about, dict) else about
            raise ArtifactError(f"{path}: a router of kind {kind!r} required, got {short(got)}")
        if about.get("format_version") != _VERSION:
            raise ArtifactError(
                f"{path}: router format {_VERSION} required, got "
                f"{short(about.get('format_version'))}: run `mergekit-mediator calibrate` again"
            )
        self.about: dict[str, Any] = about

    def experts(self, required: Sequence[str] | None = None) -> tuple[str, ...]:
        """Read the names of the experts that the router routes to.

        Args:
            required: the names of the artifact's experts, in order; None if there is no artifact.

        Raises:
            ArtifactError: the entry is no list of names, or the names differ from the required ones.
        """
        experts = self.about.get("experts")
        if not isinstance(experts, list) or not all(isinstance(name, str) for name in experts):
            raise ArtifactError(
                f"{self._path}: `experts` must be a list of names, got {short(experts)}"
            )
        if required is not None and experts != list(required):
            raise ArtifactError(
                f"{self._path}: routes to {listed(experts)}, and the manifest has {listed(required)}: "
                "merge again, or calibrate again for these experts"
            )
        return tuple(experts)

    def header(self, name: str) -> tuple[torch.dtype | str | None, list[int]]:
        """Read the dtype and the shape of a tensor.

        Returns:
            The dtype, as a string if no router has tensors of it, and the shape. None and an empty shape if
            there is no such tensor.
        """
        if name not in self.names:
            return None, []
        header = self._file.get_slice(name)
        dtype = header.get_dtype()
        return _DTYPES.get(dtype, dtype), list(header.get_shape())

    def read(self, name: str) -> Tensor:
        """Read a tensor whose header the caller has checked.

        Raises:
            ArtifactError: a number in it is not finite.
        """
        tensor: Tensor = self._file.get_tensor(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ArtifactError(f"{self._path}: {name} holds numbers that are not finite")
        return tensor


def listed(names: Iterable[str]) -> str:
    """Join names from a file to a short text on one line, for an error message."""
    return " ".join(", ".join(names).split())[:_LONGEST_LIST]


def number(about: Mapping[str, Any], key: str, path: Path) -> float:
    """Read a finite number from a router's JSON object.

    Args:
        about: the JSON object.
        key: of the number.
        path: of the router, for the error message.

    Raises:
        ArtifactError: the entry is missing or no finite number.
    """
    value = about.get(key)
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond the range of floats
        pass
    raise ArtifactError(f"{path}: {key!r} must be a finite number, got {short(value)}")
