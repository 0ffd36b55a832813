"""Adapters of an artifact on disk: experts, blends and the dense expert, each written when first needed.

They are kept in a folder that is named after the manifest's digest, so that every server of a machine shares
them, and another artifact never finds them.
"""

import shutil
import tempfile
from functools import cached_property
from pathlib import Path

import torch
from filelock import FileLock

from mergekit_mediator.engines.names import name_of
from mergekit_mediator.errors import ExportError
from mergekit_mediator.export.adapter import Adapter, Factors, blend, read_peft, write_peft
from mergekit_mediator.export.experts import StoredExperts
from mergekit_mediator.export.low_rank import LowRank
from mergekit_mediator.export.peft_lora import Holdable, to_adapter
from mergekit_mediator.serve.mixture import Mixture
from mergekit_mediator.store.manifest import MANIFEST, digest


class AdapterStore:
    """Writes adapters of one artifact at one rank.

    Attributes:
        digest: of the manifest.
        folder: where adapters are.
    """

    def __init__(self, root: Path, rank: int, cache: Path) -> None:
        """Args:
        root: of the artifact.
        rank: the largest that the engine takes.
        cache: the folder for all artifacts.
        """
        self.digest = digest(root / MANIFEST).sha256[:16]
        self._experts, self._rank = StoredExperts(root), rank
        self.folder = cache / f"{self.digest}-rank-{rank}"

    @property
    def names(self) -> tuple[str, ...]:
        """The experts."""
        return self._experts.names

    def path(self, mixture: Mixture) -> Path:
        """The folder of a mixture's adapter, which is written if it is not there.

        Raises:
            ExportError: it cannot be written.
        """
        folder = self.folder / name_of(mixture)
        if folder.is_dir():
            return folder
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock"):
                if not folder.is_dir():
                    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.folder))
                    try:
                        self._write(mixture, partial / "adapter")
                        (partial / "adapter").rename(folder)
                    finally:
                        shutil.rmtree(partial, ignore_errors=True)
        except OSError as error:
            raise ExportError(f"{folder}: cannot be written: {error.strerror}") from error
        return folder

    def remove(self, mixture: Mixture) -> None:
        """Delete the adapter of a blend."""
        shutil.rmtree(self.folder / name_of(mixture), ignore_errors=True)

    def _write(self, mixture: Mixture, out: Path) -> None:
        if mixture.is_dense:
            adapter = self._zero
        elif mixture.alone:
            adapter = to_adapter(self._experts, dict(mixture.weights), self._rank, self._holdable)
        else:
            parts = [(p, read_peft(self.path_of_expert(name))) for name, p in mixture.weights]
            adapter = blend(parts, self._rank)
        dtype = self._experts.dense.weight(self._experts.weights[0]).dtype
        write_peft(adapter, out, self._experts.manifest.base.source.rsplit("/", 1)[-1], dtype)

    def path_of_expert(self, name: str) -> Path:
        """The folder of an expert's adapter, which must be there."""
        folder = self.folder / name
        if not folder.is_dir():
            raise ExportError(
                f"{folder}: the adapter of expert {name!r} is gone: start the server again"
            )
        return folder

    @cached_property
    def _holdable(self) -> Holdable:
        return Holdable.of(self._experts.root)

    @cached_property
    def _zero(self) -> Adapter:
        """An adapter that changes nothing: one module, one component of zeros."""
        weight = next(w for w in self._experts.weights if self._holdable.kinds.get(w) == "linear")
        out, width = self._experts.dense.weight(weight).shape
        nothing = LowRank(torch.zeros(out, 1), torch.zeros(width, 1), 0.0, 0.0)
        return Adapter({weight.removesuffix(".weight"): Factors("linear", nothing)})
