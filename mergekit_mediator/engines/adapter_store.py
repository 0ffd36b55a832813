"""The adapters of an artifact on disk: of experts, blends and the dense expert, each written when first needed.

Their folder is named after the manifest's digest, so that all servers of a machine share the adapters, and another
artifact has a folder of its own.
"""

import os
import shutil
import tempfile
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch
from filelock import FileLock

from mergekit_mediator.engines.names import check_names, name_of
from mergekit_mediator.engines.settings import ServiceSettings
from mergekit_mediator.errors import ExportError, first_line
from mergekit_mediator.export.adapter import Adapter, Factors, blend, read_peft, write_peft
from mergekit_mediator.export.auto_rank import predicted_part
from mergekit_mediator.export.experts import StoredExperts
from mergekit_mediator.export.low_rank import LowRank
from mergekit_mediator.export.peft_lora import Holdable, to_adapter
from mergekit_mediator.serve.mixture import Mixture
from mergekit_mediator.share.pull import fetch_artifact
from mergekit_mediator.store.digests import digest
from mergekit_mediator.store.manifest import MANIFEST, Manifest

# The disk holds the blends of this many servers that share the cache.
_SERVERS_OF_A_MACHINE = 4
# The start of the names of folders that are not finished.
_PARTIAL = ".partial-"


class AdapterStore:
    """The adapters of one artifact at one rank; servers and threads may share their folder.

    Attributes:
        root: the artifact's directory.
        digest: the first 16 hexadecimal digits of the manifest's SHA-256.
        folder: the folder of the adapters.
    """

    def __init__(
        self, root: Path, rank: int, cache: Path, most_blends: int = 64, embeddings: bool = True
    ) -> None:
        """Open the experts, and write nothing yet.

        Args:
            root: the artifact's directory.
            rank: the largest rank that the engine allows.
            cache: the folder for the adapters of all artifacts.
            most_blends: the number of blends that stay on disk; the blends used longest ago are deleted.
                Servers that share the folder need room for the blends of all.
            embeddings: whether the engine takes adapters that change the embedding and the head.

        Raises:
            ArtifactError: the artifact cannot be read.
        """
        self.root = root
        self.digest = digest(root / MANIFEST).sha256[:16]
        self._experts, self._rank, self._most_blends = StoredExperts(root), rank, most_blends
        self._embeddings = embeddings
        self.folder = cache / f"{self.digest}-rank-{rank}{'' if embeddings else '-no-embeddings'}"

    @property
    def manifest(self) -> Manifest:
        """The artifact's manifest."""
        return self._experts.manifest

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the experts, in the artifact's order."""
        return self._experts.names

    def has(self, mixture: Mixture) -> bool:
        """Tell whether a mixture's adapter is on disk, and mark it as used now."""
        folder = self.folder / name_of(mixture)
        with suppress(OSError):  # a folder that is read-only serves as well
            os.utime(folder)
        return folder.is_dir()

    def path(self, mixture: Mixture) -> Path:
        """Return the folder of a mixture's adapter, and write the adapter first if it is not on disk.

        Raises:
            ExportError: the adapter cannot be written.
            ArtifactError: an expert's file cannot be read.
        """
        folder = self.folder / name_of(mixture)
        if self.has(mixture):
            return folder
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock"):
                self._delete_partial()
                self._ensure(mixture)
                self._delete_old_blends()
        except (OSError, ExportError) as error:
            raise ExportError(
                f"{folder}: the adapter cannot be written: {first_line(error)}: free space, or name "
                "another folder in MEDIATOR_CACHE"
            ) from error
        return folder

    def lost(self, expert: str) -> str:
        """Tell in words which part of an expert its adapter lacks; an empty text if it lacks nothing.

        Raises:
            ExportError: the adapter cannot be read.
        """
        adapter = read_peft(self.folder / expert)
        parts = []
        if adapter.squared_error:
            kept = (
                "most of it noise of its random signs"
                if self._experts.is_noisy(expert)
                else f"and is predicted to keep {predicted_part(adapter):.2%} of its gain"
            )
            parts.append(
                f"rank {self._rank} leaves out {adapter.squared_error:.2%} of its squared change, {kept}"
            )
        if adapter.dropped:
            parts.append(f"{len(adapter.dropped)} norms, biases and other weights stay dense")
        return "; ".join(parts)

    def _ensure(self, mixture: Mixture) -> Path:
        """Write a mixture's adapter if it is not on disk; the caller holds the lock."""
        folder = self.folder / name_of(mixture)
        if not folder.is_dir():
            adapter = self._adapter(mixture)
            base = self._experts.manifest.base.source.rsplit("/", 1)[-1]
            dtype = self._experts.dense.weight(self._experts.weights[0]).dtype
            partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self.folder))
            try:
                write_peft(adapter, partial / "adapter", base, dtype)
                (partial / "adapter").rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return folder

    def _adapter(self, mixture: Mixture) -> Adapter:
        """Make a mixture's adapter; that of a blend comes from the adapters of its experts."""
        if mixture.is_dense:
            return self._zero
        if mixture.alone:
            return to_adapter(self._experts, dict(mixture.weights), self._rank, self._holdable)
        experts = [(p, Mixture.of(name, self.names)) for name, p in mixture.weights]
        return blend([(p, read_peft(self._ensure(expert))) for p, expert in experts], self._rank)

    def _delete_partial(self) -> None:
        """Delete the folders that a killed server left behind; the caller holds the lock."""
        for folder in self.folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _delete_old_blends(self) -> None:
        """Delete the blends that were used longest ago; the caller holds the lock."""
        blends = [folder for folder in self.folder.iterdir() if "=" in folder.name]
        blends.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
        for folder in blends[self._most_blends :]:
            # Another server must not see a folder of which half is deleted.
            partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self.folder))
            folder.rename(partial / "adapter")
            shutil.rmtree(partial, ignore_errors=True)

    @cached_property
    def _holdable(self) -> Holdable:
        return Holdable.of(self._experts.root, self._embeddings)

    @cached_property
    def _zero(self) -> Adapter:
        """The adapter of the dense expert, which changes nothing: one module and one component of zeros."""
        weight = next(
            (w for w in self._experts.weights if self._holdable.kinds.get(w) == "linear"), None
        )
        if weight is None:
            raise ExportError(
                f"{self._experts.root}: an adapter needs a linear layer that an expert changes, and there is "
                "none: serve with MediatorModel"
            )
        out, width = self._experts.dense.weight(weight).shape
        zeros = LowRank(torch.zeros(out, 1), torch.zeros(width, 1), 0.0, 0.0)
        return Adapter({weight.removesuffix(".weight"): Factors("linear", zeros)})


def open_store(
    settings: ServiceSettings, served: str, revision: str | None, rank: int, embeddings: bool = True
) -> AdapterStore:
    """Verify the artifact of an engine, and open its adapters.

    Args:
        settings: the service's settings; `artifact` names the artifact if the engine serves another model.
        served: the model that the engine serves.
        revision: the revision of that model on the Hub, or None.
        rank: the largest rank that the engine allows.
        embeddings: whether the engine takes adapters that change the embedding and the head.

    Raises:
        EngineError: an expert's name means something else on engines.
        MediatorError: there is no artifact, or it does not match its manifest.
    """
    if settings.artifact:
        served, revision = settings.artifact, None
    root, manifest = fetch_artifact(served, revision)
    check_names(manifest.expert_names)
    most_blends = _SERVERS_OF_A_MACHINE * settings.blends
    return AdapterStore(root, rank, settings.cache, most_blends, embeddings)
