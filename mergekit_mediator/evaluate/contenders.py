"""Contenders of an evaluation: weights that answer prompts, from a checkpoint, an adapter or an artifact."""

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

    Attributes:
        identity: a text that no other weights have; scores are stored under it.
        load: takes a dtype (`auto` is the stored dtype) and whether the model's own code may run, and
            returns a context that yields the model. A model that is loaded already keeps its dtype.
    """

    identity: str
    load: Callable[[str, bool], AbstractContextManager[Any]]


def located(what: str, source: str) -> str:
    """Make the directories in the name of a model, or of `model+adapter`, absolute.

    Args:
        what: the model's part in the evaluation, for the error text.
        source: directories of this machine, or names on the Hub.

    Raises:
        InputError: a path is not on this machine.
    """
    parts = []
    for part in source.split("+"):
        path = Path(part)
        if not path.is_dir() and (path.is_absolute() or part[0] == "." or part.count("/") > 1):
            raise InputError(
                f"{what}: {part} is not on this machine: name its directory with --base DIR or "
                "--expert NAME=DIR"
            )
        parts.append(str(path.resolve()) if path.is_dir() else part)
    return "+".join(parts)


def checkpoint(source: str | Path) -> Contender:
    """Make a contender of a model in a directory or on the Hub, or of `model+adapter`."""
    model, _, adapter = str(source).partition("+")
    if adapter:
        return adapted(model, Path(adapter))

    @contextmanager
    def load(dtype: str, trust_remote_code: bool) -> Iterator[Any]:
        yield load_plain(source, dtype, trust_remote_code)

    return Contender(_identity(source), load)


def mixed(model: MediatorModel, mixture: Named) -> Contender:
    """Make a contender of an artifact under one mixture."""
    return Contender(model.mixture_digest(mixture), lambda *_: model.mixture(mixture))


def adapted(source: str | Path, adapter: Path) -> Contender:
    """Make a contender of a model into which PEFT merges a LoRA adapter.

    The context of `Contender.load` raises InputError if PEFT is not installed.
    """

    @contextmanager
    def load(dtype: str, trust_remote_code: bool) -> Iterator[Any]:
        try:
            from peft import PeftModel
        except ImportError as error:
            raise InputError(f"adapter {adapter} needs PEFT: pip install peft") from error
        model = load_plain(source, dtype, trust_remote_code)
        # PEFT warns of tied embeddings; they are merged once, as they should be.
        with warnings.catch_warnings(action="ignore"):
            merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        yield merged

    return Contender(f"{_identity(source)} + {_identity(adapter)}", load)


def weight_bytes(folder: Path) -> int:
    """Count the bytes of the weight files of a checkpoint or an adapter."""
    return sum(path.stat().st_size for path in _weight_files(folder))


def _weight_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors")] or [*folder.glob("*.bin")])


def _identity(source: str | Path) -> str:
    """Hash a source's name, and the names, sizes and times of its weight files if it is a directory."""
    files = _weight_files(Path(source))
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr((str(source), stats)).encode()).hexdigest()[:16]
