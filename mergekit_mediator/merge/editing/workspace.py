"""A published artifact while it is changed: a staging directory that shares the artifact's files."""

import errno
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from mergekit_mediator import __version__
from mergekit_mediator.errors import EditError, OutputError, first_line
from mergekit_mediator.merge.editing.card import renew_card
from mergekit_mediator.models.loading import DenseCheckpoint
from mergekit_mediator.store.digests import digests
from mergekit_mediator.store.expert_file import ExpertFile, open_expert
from mergekit_mediator.store.manifest import (
    CARD,
    Change,
    ExpertEntry,
    Manifest,
    read_manifest,
    vouched_for,
)
from mergekit_mediator.store.staging import Staging
from mergekit_mediator.store.verification import verify_files

# Errors of file systems that give a file no second name.
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK)


class Edited(NamedTuple):
    """An artifact after a change.

    Attributes:
        manifest: the new manifest.
        changes: the changes, as the manifest's history ends.
    """

    manifest: Manifest
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Workspace:
    """An artifact that is being changed.

    A file in `root` may be a second name of the artifact's own file. So replace files, and never write into them.

    Attributes:
        out: the artifact's directory, which stays as it is until `publish`.
        root: the staging directory, with all files that the manifest names.
        manifest: the artifact's manifest before the change.
    """

    out: Path
    root: Path
    manifest: Manifest
    _staging: Staging

    def entry(self, name: str) -> ExpertEntry:
        """Find an expert in the manifest.

        Raises:
            EditError: the artifact has no such expert.
        """
        for entry in self.manifest.experts:
            if entry.name == name:
                return entry
        names = ", ".join(self.manifest.expert_names)
        raise EditError(f"{self.out}: has no expert {name!r}: name one of {names}")

    def path(self, entry: ExpertEntry) -> Path:
        """The path of an expert's file in the staging directory."""
        return self.root / "mediator" / entry.file

    @cached_property
    def dense(self) -> DenseCheckpoint:
        """The weights of the dense expert before the change."""
        return DenseCheckpoint(self.out)

    @cached_property
    def files(self) -> Mapping[str, ExpertFile]:
        """The files of all experts before the change, by name."""
        entries = self.manifest.experts
        return {entry.name: open_expert(self.out, entry, self.dense.shapes) for entry in entries}

    @cached_property
    def is_relative_to_base(self) -> bool:
        """Whether experts are stored relative to the base, which `bits`, a `budget` and factors of adapters need.

        With `reference: base` the dense expert's routed weights are the base's. With the name of a merge method, `bits`
        and a `budget` are of the difference from the dense expert, in the same forms.
        """
        parameters = self.manifest.parameters
        if parameters.get("reference") == "base" or "slopes" in parameters:
            return True
        return any(d.share for file in self.files.values() for d in file.weights.values())

    @cached_property
    def routed_parameters(self) -> int:
        """The number of parameters that an expert may store: those of the routed floating-point weights."""
        routed = [w for layer in self.manifest.routed_layers for w in layer.weights]
        floating = [w for w in routed if self.dense.weight(w).is_floating_point()]
        return sum(math.prod(self.dense.shapes[w]) for w in floating)

    def bits_per_parameter(self, name: str) -> float:
        """The bits that an expert takes for each parameter that it may store, without the header of its file."""
        file = self.files[name]
        return 8 * sum(map(file.stored_bytes, file.weights)) / max(1, self.routed_parameters)

    def publish(self, manifest: Manifest, *changes: Change) -> "Edited":
        """Replace the artifact by the content of the staging directory, in one step.

        Args:
            manifest: the new manifest; its digests are those of before, and its history lacks the changes.
            changes: the changes.

        Returns:
            The manifest as it is written, and the changes.

        Raises:
            OSError: a step failed, and the artifact is as before.
        """
        names = vouched_for(self.root)
        new = [name for name in names if not self._is_shared(name)]
        kept = {name: manifest.files[name] for name in names if name not in new}
        fresh = digests(self.root, new)
        manifest = manifest.model_copy(
            update={
                "files": {name: fresh.get(name) or kept[name] for name in names},
                "history": (*manifest.history, *changes),
            }
        )
        renew_card(self.root, self.manifest, manifest)
        self._staging.publish(manifest)
        return Edited(manifest, changes)

    def _is_shared(self, name: str) -> bool:
        before = self.out / name
        return before.exists() and before.samefile(self.root / name)


@contextmanager
def editing(out: Path, inputs: Mapping[str, Path] | None = None) -> Iterator[Workspace]:
    """Verify an artifact and prepare its change. Unless the caller publishes, the artifact stays as it is.

    Args:
        out: the artifact's directory.
        inputs: the directories that the change reads, by their names in error messages.

    Raises:
        ArtifactError: the artifact does not verify.
        OutputError: the artifact is one of the inputs, another process writes there, or a file cannot be written.
    """
    try:
        with Staging(out, overwrite=True, inputs=inputs) as staging:
            manifest = read_manifest(out)
            verify_files(out, manifest)
            for name in (*manifest.files, *([CARD] if (out / CARD).is_file() else [])):
                _share(out / name, staging.path / name)
            yield Workspace(out, staging.path, manifest, staging)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{out}: cannot be written: {first_line(error)}") from error


def change(action: str, expert: str, note: str, **details: object) -> Change:
    """Describe a change by this version of the package; see `manifest.Change`."""
    return Change.model_validate(
        {
            "action": action,
            "expert": expert,
            "package_version": __version__,
            "details": details,
            "note": note,
        }
    )


def _share(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no second names."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)
