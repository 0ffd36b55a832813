"""Publishing a merge: all files are written beside the output, then put into place in one step.

Files of the user in the output stay.
"""

import errno
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from mergekit_mediator.errors import OutputError
from mergekit_mediator.store import durable, in_place
from mergekit_mediator.store.exchange import carry_over, exchange_with
from mergekit_mediator.store.manifest import CARD, MANIFEST, Manifest, files_below, write_manifest
from mergekit_mediator.store.model_files import ModelFiles
from mergekit_mediator.store.output_lock import output_lock
from mergekit_mediator.store.staging_directories import new_staging_directory, staging_directories


class Staging:
    """A directory that becomes the output when a merge is complete, and is removed if it fails.

    Use it as a context manager, and call `publish` at the end. One process at a time stages for an output.
    The next process removes the staging directory of a killed one, and undoes its steps.

    The directory is beside the output. It is renamed, or exchanged with an output that exists. It is inside
    the output if that is empty, the working directory or a mount point, or if its parent is not writable.
    Then files are moved one by one, and also if the system exchanges no directories or gives files no second
    name. See `exchange` and `in_place`.

    Attributes:
        path: of the staging directory, within the context.
    """

    path: Path

    def __init__(
        self, out: Path, overwrite: bool = False, inputs: Mapping[str, Path] | None = None
    ) -> None:
        """Check the place of the output; no file is written.

        Args:
            out: the output directory, or a link to it.
            overwrite: whether the merge may replace a model in the output.
            inputs: the directories that the merge reads, by their names in error messages.

        Raises:
            OutputError: the output is a file or an input, or one of the two is inside the other.
        """
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out}: is a file: choose another output directory")
        self.out, self._place, self._overwrite = out, out.resolve(), overwrite
        self._exchanged = False
        for name, path in (inputs or {}).items():
            relation = _relation(self._place, path.resolve())
            if relation:
                raise OutputError(
                    f"{out}: {relation} the directory of {name}, which the merge reads: choose "
                    "another output directory"
                )

    def __enter__(self) -> "Staging":
        """Lock the output and make the staging directory.

        Raises:
            OutputError: another process writes there, the output holds a model and `overwrite` is False,
                or the output cannot be written.
        """
        parent = self._place.parent
        try:
            with ExitStack() as stack:
                if not parent.exists():
                    missing = [folder for folder in self._place.parents if not folder.exists()]
                    stack.callback(_remove_empty, missing)
                    parent.mkdir(parents=True, exist_ok=True)
                writable = stack.enter_context(output_lock(self.out))
                for path in list(staging_directories(self._place)):  # of killed processes
                    self._remove(path)
                ModelFiles(self.out).check(self._overwrite)
                self._make(writable)
                stack.callback(self._discard)
                self._stack = stack.pop_all()
        except OSError as error:
            raise OutputError(
                f"{self.out}: cannot be written in {parent}: {error.strerror}: choose another "
                "output directory"
            ) from error
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._stack.close()
        except OSError as error:
            tqdm.write(
                f"warning: {error}: the next merge into {self.out} removes the remaining files"
            )

    def publish(self, manifest: Manifest) -> None:
        """Write the manifest, and put all files into place.

        Args:
            manifest: of the artifact, with the digests of its files.

        Raises:
            OutputError: the output now holds files that a merge must not replace.
            OSError: a step failed. The output is unchanged, or it is complete.
        """
        write_manifest(self.path, manifest)
        self._old = ModelFiles(self.out)
        self._old.check(self._overwrite)
        if self._old.holds_users_card:
            tqdm.write(f"note: {self.out / CARD} stays: no model card is written")
            (self.path / CARD).unlink(missing_ok=True)
        new, old = [*files_below(self.path), MANIFEST], self._old.replaced
        self._old.make_way(new)
        durable.sync_tree(self.path)
        if self.path.parent != self._place:
            if not self._place.exists():
                os.rename(self.path, self._place)
                durable.sync(self._place.parent)
                return
            if exchange_with(self.path, self._place, old):
                self._exchanged = True
                durable.sync(self._place.parent)
                return
        in_place.publish_in_place(self.path, self._place, new, old)

    def _make(self, writable: Path) -> None:
        """Make the staging directory: beside the output, or inside if the output cannot be exchanged."""
        place = self._place
        exists = place.is_dir()
        inside = exists and (
            writable == place or Path.cwd().is_relative_to(place) or not any(place.iterdir())
        )
        self.path = new_staging_directory(place, inside=exists)
        self.path.mkdir()
        if exists and not inside:
            beside = new_staging_directory(place, inside=False)
            try:
                os.rename(self.path, beside)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                return  # a mount point that the system does not show as one
            self.path = beside

    def _discard(self) -> None:
        if not self.path.exists():
            return
        if self._exchanged:  # the user may have written to the old directory before the exchange
            carry_over(self.path, self._place, self._old.replaced)
        self._remove(self.path)

    def _remove(self, path: Path) -> None:
        in_place.roll_back(path, self._place)
        durable.remove_tree(path)


def _relation(out: Path, read: Path) -> str | None:
    """The relation of the output to an input directory that forbids a merge, in a word or two; else None."""
    if _is_same(out, read):
        return "is"
    if any(_is_same(folder, read) for folder in out.parents):
        return "lies inside"
    return "contains" if any(_is_same(folder, out) for folder in read.parents) else None


def _is_same(one: Path, other: Path) -> bool:
    return one == other or (one.exists() and other.exists() and one.samefile(other))


def _remove_empty(folders: list[Path]) -> None:
    """Remove empty folders, the deepest first, up to the first that is missing or not empty."""
    for folder in folders:
        if not folder.is_dir() or any(folder.iterdir()):
            return
        folder.rmdir()
