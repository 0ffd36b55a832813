"""One safetensors file per router: tensors, and a JSON object in the header. No pickle."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_mediator import durable
from mergekit_mediator.errors import ArtifactError, OutputError

_KEY = "mediator_router"
_VERSION = 1


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


def load_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the JSON object of a router file.

    Raises:
        ArtifactError: the file is missing, damaged, of another kind or version, or holds numbers
            that are not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot read the router {path}: {error}") from error
    try:
        about = json.loads(metadata.get(_KEY, ""))
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{path} is no router: its header has no JSON {_KEY!r}") from error
    if not isinstance(about, dict) or about.get("kind") != kind:
        got = about.get("kind") if isinstance(about, dict) else about
        raise ArtifactError(f"{path} must hold a router of kind {kind!r}, got {got!r}")
    if about.get("format_version") != _VERSION:
        raise ArtifactError(
            f"{path} has router format {about.get('format_version')!r}, this version reads "
            f"{_VERSION}: run `mergekit-mediator calibrate` again"
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ArtifactError(f"{path}: {name} holds numbers that are not finite")
    return tensors, about


def number(about: Mapping[str, Any], key: str, path: Path) -> float:
    """A finite number of a router's JSON object.

    Raises:
        ArtifactError: it is missing or no finite number.
    """
    value = about.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ArtifactError(f"{path}: {key!r} must be a finite number, got {value!r}")
    return float(value)
