"""Whose the files of an output directory are: the model's, which a merge replaces, or the user's, which it keeps."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml
from huggingface_hub.repocard import metadata_load

from mergekit_mediator.errors import ArtifactError, OutputError
from mergekit_mediator.remote_code import MODELING
from mergekit_mediator.store.loaded_files import FOLDERS, is_loaded, is_of_a_model
from mergekit_mediator.store.manifest import CARD, CONFIG_SOURCE, MANIFEST, read_manifest


class ModelFiles:
    """The files of the model that a directory holds.

    Links are entries themselves: what they lead to belongs to nobody here.

    Attributes:
        replaced: the files that a new model takes the place of, as paths inside the directory: those
            that the manifest names, those that can only be a model's, and what a merge adds to them.
    """

    def __init__(self, out: Path) -> None:
        """
        Args:
            out: a directory, or nothing yet.
        """
        self._out = out
        vouched = _vouched(out)
        entries = [name for name in _entries(out) if name not in (CARD, CONFIG_SOURCE)]
        self._model = [name for name in entries if name in vouched or _is_of_a_model(name)]
        self._unclear = sorted(set(filter(is_loaded, entries)).difference(self._model))
        self.replaced = sorted({*self._model, *_additions(out)})

    @property
    def holds_users_card(self) -> bool:
        """Whether there is a README that no merge wrote."""
        return os.path.lexists(self._out / CARD) and CARD not in self.replaced

    def check(self, overwrite: bool) -> None:
        """Refuse a directory that no model may be put into.

        Raises:
            OutputError: it holds a model and `overwrite` is not set, or files that would be loaded with
                the new one and may yet be the user's.
        """
        if self._model and not overwrite:
            raise OutputError(
                f"{self._out}: already holds a model ({self._model[0]}): choose another directory, or "
                "run `mergekit-mediator merge --overwrite`"
            )
        if self._unclear:
            raise OutputError(
                f"{self._out / self._unclear[0]}: would be loaded with the model, and may be yours: "
                "move it to another directory, or remove it"
            )

    def make_way(self, new: Iterable[str]) -> None:
        """Refuse files that would take the place of the user's.

        Raises:
            OutputError: something else has one of the names.
        """
        for name in new:
            for folder in (*(f.as_posix() for f in reversed(Path(name).parents)), name):
                there = self._out / folder
                if folder in self.replaced:
                    break
                if os.path.lexists(there) and (folder == name or not there.is_dir()):
                    raise OutputError(f"{there}: has the name of a file of the model: move it")


def _vouched(out: Path) -> set[str]:
    """The files that the manifest names, if there is one that can be read."""
    try:
        return set(read_manifest(out).files)
    except ArtifactError:
        return set()


def _is_of_a_model(name: str) -> bool:
    unfinished = name.startswith("mediator/") and name.endswith(".partial")
    return is_of_a_model(name) or name in (MANIFEST, MODELING, *FOLDERS) or unfinished


def _entries(out: Path) -> Iterator[str]:
    """The files in all folders that a model has, and links in the place of such folders."""
    for folder in FOLDERS:
        path = out / folder
        if folder != "." and path.is_symlink():
            yield folder
        elif path.is_dir() and not ("/" in folder and path.parent.is_symlink()):
            yield from (
                entry.relative_to(out).as_posix()
                for entry in path.iterdir()
                if entry.is_symlink() or not entry.is_dir()
            )


def _additions(out: Path) -> Iterator[str]:
    """The configuration of a merge, and a card that a merge wrote: mergekit tags those that it writes."""
    if (out / CONFIG_SOURCE).is_file():
        yield CONFIG_SOURCE
    try:
        tags = (metadata_load(out / CARD) or {}).get("tags")
    except (OSError, ValueError, yaml.YAMLError):  # there is none, or it is no card
        return
    if isinstance(tags, list) and "mergekit" in tags:
        yield CARD
