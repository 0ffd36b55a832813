"""The files of an output directory: a merge replaces those of the model, and leaves those of the user alone."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml
from huggingface_hub.repocard import metadata_load

from mergekit_mediator.errors import ArtifactError, OutputError
from mergekit_mediator.remote_code import MODELING
from mergekit_mediator.store.loaded_files import FOLDERS, is_loaded, is_of_a_model
from mergekit_mediator.store.manifest import (
    CARD,
    CONFIG_SOURCE,
    EVALUATION,
    MANIFEST,
    PICTURES,
    read_manifest,
)


class ModelFiles:
    """The files of the model that a directory holds.

    A link counts as a file; its target is never touched.

    Attributes:
        replaced: the files that a new model replaces, as paths inside the directory. The manifest names
            them, or they can only be a model's, or a merge added them.
    """

    def __init__(self, out: Path) -> None:
        """List the files.

        Args:
            out: the output directory, which need not exist.
        """
        self._out = out
        vouched = _vouched(out)
        entries = [name for name in _entries(out) if name not in (CARD, CONFIG_SOURCE)]
        self._model = [name for name in entries if name in vouched or _is_of_a_model(name)]
        self._unclear = sorted(set(filter(is_loaded, entries)).difference(self._model))
        self.replaced = sorted({*self._model, *_additions(out)})

    @property
    def holds_users_card(self) -> bool:
        """Whether the directory has a README that no merge wrote."""
        return os.path.lexists(self._out / CARD) and CARD not in self.replaced

    def check(self, overwrite: bool) -> None:
        """Check that a merge may put a model into the directory.

        Args:
            overwrite: whether the merge may replace a model.

        Raises:
            OutputError: the directory holds a model and `overwrite` is False, or it holds a file that
                loading the new model would read and that may be the user's.
        """
        if self._model and not overwrite:
            raise OutputError(
                f"{self._out}: holds a model ({self._model[0]}): choose another directory, or run "
                "`mergekit-mediator merge --overwrite`"
            )
        if self._unclear:
            raise OutputError(
                f"{self._out / self._unclear[0]}: loading the model would read this file, which may be "
                "yours: move it to another directory, or remove it"
            )

    def make_way(self, new: Iterable[str]) -> None:
        """Check that no file of a new model takes the place of a file of the user.

        Args:
            new: paths of the new files inside the directory.

        Raises:
            OutputError: a file or folder of the user has one of the names.
        """
        for name in new:
            for folder in (*(f.as_posix() for f in reversed(Path(name).parents)), name):
                place = self._out / folder
                if folder in self.replaced:
                    break
                if os.path.lexists(place) and (folder == name or not place.is_dir()):
                    raise OutputError(f"{place}: has the name of a file of the model: move it")


def _vouched(out: Path) -> set[str]:
    """The files that the manifest names; none without a readable manifest."""
    try:
        return set(read_manifest(out).files)
    except ArtifactError:
        return set()


def _is_of_a_model(name: str) -> bool:
    unfinished = name.startswith("mediator/") and name.endswith(".partial")
    return is_of_a_model(name) or name in (MANIFEST, MODELING, *FOLDERS) or unfinished


def _entries(out: Path) -> Iterator[str]:
    """The files in all folders of a model, and the links in the place of such folders."""
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
    """The configuration of a merge, evaluation and pictures, and the card if mergekit's tag shows that a merge wrote it."""
    for name in (CONFIG_SOURCE, EVALUATION, *PICTURES):
        if (out / name).is_file():
            yield name
    try:
        tags = (metadata_load(out / CARD) or {}).get("tags")
    except (OSError, ValueError, yaml.YAMLError):  # there is no card, or it has no valid header
        return
    if isinstance(tags, list) and "mergekit" in tags:
        yield CARD
