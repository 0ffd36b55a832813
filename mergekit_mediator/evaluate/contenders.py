"""Contenders of an evaluation: weights that answer prompts, wherever they come from."""

import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_mediator.errors import InputError
from mergekit_mediator.models.loading import load_plain
from mergekit_mediator.serve.mixture import Named
from mergekit_mediator.serve.model import MediatorModel


@dataclass(frozen=True)
class Contender:
    """Weights that answer prompts.

    identity: tells these weights from all others, so that scores can be kept by it.
    load: gives the model for as long as it is used, in a dtype, of which `auto` is the stored one, and
        with code of its own if that may run. A model that is loaded already stays as it is.
    """

    identity: str
    load: Callable[[str, bool], AbstractContextManager[Any]]


def located(what: str, source: str) -> str:
    """A model, or `model+adapter`, with directories of this machine as absolute paths.

    Raises:
        InputError: a path that is not on this machine.
    """
    parts = []
    for part in source.split("+"):
        path = Path(part)
        if not path.is_dir() and (path.is_absolute() or part[0] == "." or part.count("/") > 1):
            raise InputError(
                f"{what}: {part} is not on this machine: name where it is with --base DIR or "
                "--expert NAME=DIR"
            )
        parts.append(str(path.resolve()) if path.is_dir() else part)
    return "+".join(parts)


def checkpoint(source: str | Path) -> Contender:
    """An ordinary model, in a directory or on the Hub; or one with an adapter, `model+adapter`."""
    model, _, adapter = str(source).partition("+")
    if adapter:
        return adapted(model, Path(adapter))

    @contextmanager
    def load(dtype: str, trust_remote_code: bool) -> Iterator[Any]:
        yield load_plain(source, dtype, trust_remote_code)

    return Contender(_identity(source), load)


def mixed(model: MediatorModel, mixture: Named) -> Contender:
    """An artifact under one mixture."""
    return Contender(model.mixture_digest(mixture), lambda *_: model.mixture(mixture))


def adapted(source: str | Path, adapter: Path) -> Contender:
    """An ordinary model with a LoRA adapter merged in, as PEFT does it."""

    @contextmanager
    def load(dtype: str, trust_remote_code: bool) -> Iterator[Any]:
        try:
            from peft import PeftModel
        except ImportError as error:
            raise InputError(f"adapter {adapter} needs PEFT: pip install peft") from error
        model = load_plain(source, dtype, trust_remote_code)
        with warnings.catch_warnings(action="ignore"):  # of tied embeddings, which are merged once
            merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        yield merged

    return Contender(f"{_identity(source)} + {_identity(adapter)}", load)


def weight_bytes(folder: Path) -> int:
    """The size of a checkpoint's or adapter's weight files."""
    return sum(path.stat().st_size for path in _weight_files(folder))


def _weight_files(folder: Path) -> list[Path]:
    found = [*folder.glob("*.safetensors")] or [*folder.glob("*.bin")]
    return sorted(found)


def _identity(source: str | Path) -> str:
    """Of the files' names, sizes and times; of a repository on the Hub, its name."""
    files = _weight_files(Path(source))
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr((str(source), stats)).encode()).hexdigest()[:16]
