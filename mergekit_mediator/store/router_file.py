"""One safetensors file per router: tensors, and a JSON object in the header. No pickle."""

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
# The JSON object takes no more than this, and this for each tensor.
_ABOUT_BYTES = 1 << 16
_ABOUT_BYTES_PER_TENSOR = 1 << 10
_LONGEST_LIST = 500  # letters of it in an error message
_DTYPES = {"U8": torch.uint8, "I64": torch.int64, "F32": torch.float32}


def save_tensors(
    path: Path, kind: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]
) -> None:
    """Write a router of a kind, and move it into place at once, so that an older one stays until then.

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
        raise OutputError(f"cannot write the router {path}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


class RouterFile:
    """A router on disk, memory-mapped: its JSON object, and tensors that are read when their header is right.

    Attributes:
        names: of the tensors.
        about: the JSON object.
    """

    def __init__(self, path: Path, kind: str) -> None:
        """Read and check the header.

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
            raise ArtifactError(f"cannot read the router {path}: {error}") from error
        most = _ABOUT_BYTES + _ABOUT_BYTES_PER_TENSOR * len(self.names)
        if len(text) > most:
            raise ArtifactError(
                f"{path}: {_KEY!r} of at most {most} bytes required, got {len(text)}"
            )
        try:
            about = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{path} is no router: its header has no JSON {_KEY!r}") from error
        if not isinstance(about, dict) or about.get("kind") != kind:
            got = about.get("kind") if isinstance(about, dict) else about
            raise ArtifactError(f"{path} must hold a router of kind {kind!r}, got {short(got)}")
        if about.get("format_version") != _VERSION:
            raise ArtifactError(
                f"{path} has router format {short(about.get('format_version'))}, this version reads "
                f"{_VERSION}: run `mergekit-mediator calibrate` again"
            )
        self.about: dict[str, Any] = about

    def experts(self, own: Sequence[str] | None = None) -> tuple[str, ...]:
        """The experts that the router routes to.

        Args:
            own: those of the artifact, which they must be; None if they are not known.

        Raises:
            ArtifactError: they are no list of names, or others.
        """
        experts = self.about.get("experts")
        if not isinstance(experts, list) or not all(isinstance(name, str) for name in experts):
            raise ArtifactError(
                f"{self._path}: `experts` must be a list of names, got {short(experts)}"
            )
        if own is not None and experts != list(own):
            raise ArtifactError(
                f"{self._path}: routes to {listed(experts)}, and the manifest has {listed(own)}: merge "
                "again, or calibrate again for these experts"
            )
        return tuple(experts)

    def header(self, name: str) -> tuple[torch.dtype | str | None, list[int]]:
        """The dtype of a tensor (as safetensors names it, if no router is stored in it) and its shape; None
        and an empty shape of one that is not there."""
        if name not in self.names:
            return None, []
        header = self._file.get_slice(name)
        dtype = header.get_dtype()
        return _DTYPES.get(dtype, dtype), list(header.get_shape())

    def read(self, name: str) -> Tensor:
        """A tensor, of which the header was checked.

        Raises:
            ArtifactError: it holds numbers that are not finite.
        """
        tensor: Tensor = self._file.get_tensor(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ArtifactError(f"{self._path}: {name} holds numbers that are not finite")
        return tensor


def listed(names: Iterable[str]) -> str:
    """Names on one line of an error message, whatever a file holds."""
    return " ".join(", ".join(names).split())[:_LONGEST_LIST]


def number(about: Mapping[str, Any], key: str, path: Path) -> float:
    """A finite number of a router's JSON object.

    Raises:
        ArtifactError: it is missing or no finite number.
    """
    value = about.get(key)
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:  # of an integer beyond the floats
        pass
    raise ArtifactError(f"{path}: {key!r} must be a finite number, got {short(value)}")
