"""Adapters of an artifact on disk: experts, blends and the dense expert, each written when first needed.

They are kept in a folder that is named after the manifest's digest, so that every server of a machine shares
them, and another artifact never finds them.
"""

import os
import shutil
import tempfile
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch
from filelock import FileLock

from mergekit_mediator.engines.names import name_of
from mergekit_mediator.errors import ExportError, first_line
from mergekit_mediator.export.adapter import Adapter, Factors, blend, read_peft, write_peft
from mergekit_mediator.export.experts import StoredExperts
from mergekit_mediator.export.low_rank import LowRank
from mergekit_mediator.export.peft_lora import Holdable, to_adapter
from mergekit_mediator.serve.mixture import Mixture
from mergekit_mediator.store.manifest import MANIFEST, digest


class AdapterStore:
    """Writes adapters of one artifact at one rank.

    Attributes:
        digest: the first 16 hexadecimal digits of the manifest's SHA-256.
        folder: where adapters are.
    """

    def __init__(self, root: Path, rank: int, cache: Path, most_blends: int = 64) -> None:
        """Open the experts; nothing is written yet.

        Args:
            root: of the artifact.
            rank: the largest that the engine takes.
            cache: the folder for all artifacts.
            most_blends: the blends that stay on disk; those that were used longest ago are deleted. Servers
                that share the folder need room for the blends of all.
        """
        self.digest = digest(root / MANIFEST).sha256[:16]
        self._experts, self._rank, self._most_blends = StoredExperts(root), rank, most_blends
        self.folder = cache / f"{self.digest}-rank-{rank}"

    @property
    def names(self) -> tuple[str, ...]:
        """The experts."""
        return self._experts.names

    def has(self, mixture: Mixture) -> bool:
        """Whether a mixture's adapter is there; it then counts as just used."""
        folder = self.folder / name_of(mixture)
        with suppress(OSError):  # a folder that may only be read is no obstacle
            os.utime(folder)
        return folder.is_dir()

    def path(self, mixture: Mixture) -> Path:
        """The folder of a mixture's adapter, which is written if it is not there.

        Raises:
            ExportError: it cannot be written.
        """
        folder = self.folder / name_of(mixture)
        if self.has(mixture):
            return folder
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock"):
                self._ensure(mixture)
                self._delete_old_blends()
        except (OSError, ExportError) as error:
            raise ExportError(
                f"{folder}: no adapter can be written (MEDIATOR_CACHE names the cache): "
                f"{first_line(error)}"
            ) from error
        return folder

    def lost(self, expert: str) -> str:
        """What the adapter of an expert does not hold of the expert, in words; empty if that is nothing.

        Raises:
            ExportError: the adapter cannot be read.
        """
        adapter = read_peft(self.folder / expert)
        parts = []
        if adapter.squared_error:
            parts.append(
                f"rank {self._rank} leaves out {adapter.squared_error:.2%} of its squared change"
            )
        if adapter.dropped:
            parts.append(f"{len(adapter.dropped)} norms, biases and other weights stay dense")
        return "; ".join(parts)

    def _ensure(self, mixture: Mixture) -> Path:
        """Write a mixture's adapter if it is not there; the caller holds the lock."""
        folder = self.folder / name_of(mixture)
        if not folder.is_dir():
            adapter = self._adapter(mixture)
            base = self._experts.manifest.base.source.rsplit("/", 1)[-1]
            dtype = self._experts.dense.weight(self._experts.weights[0]).dtype
            partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.folder))
            try:
                write_peft(adapter, partial / "adapter", base, dtype)
                (partial / "adapter").rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return folder

    def _adapter(self, mixture: Mixture) -> Adapter:
        if mixture.is_dense:
            return self._zero
        if mixture.alone:
            return to_adapter(self._experts, dict(mixture.weights), self._rank, self._holdable)
        experts = [(p, Mixture.of(name, self.names)) for name, p in mixture.weights]
        return blend([(p, read_peft(self._ensure(expert))) for p, expert in experts], self._rank)

    def _delete_old_blends(self) -> None:
        blends = [folder for folder in self.folder.iterdir() if "=" in folder.name]
        blends.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
        for folder in blends[self._most_blends :]:
            shutil.rmtree(folder, ignore_errors=True)

    @cached_property
    def _holdable(self) -> Holdable:
        return Holdable.of(self._experts.root)

    @cached_property
    def _zero(self) -> Adapter:
        """An adapter that changes nothing: one module, one component of zeros."""
        weight = next(
            (w for w in self._experts.weights if self._holdable.kinds.get(w) == "linear"), None
        )
        if weight is None:
            raise ExportError(
                f"{self._experts.root}: no expert changes a linear layer, so no adapter can be made"
            )
        out, width = self._experts.dense.weight(weight).shape
        nothing = LowRank(torch.zeros(out, 1), torch.zeros(width, 1), 0.0, 0.0)
        return Adapter({weight.removesuffix(".weight"): Factors("linear", nothing)})
