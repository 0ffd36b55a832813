"""The dense expert's checkpoint, written as its weights come, also before it is known which are routed."""

import tempfile
from collections.abc import Container
from pathlib import Path

import torch
from mergekit.io.tensor_writer import TensorWriter
from mergekit.options import MergeOptions
from safetensors import safe_open
from safetensors.torch import save_file

from mergekit_mediator.merge.passes import DenseVersions


class DenseWriter:
    """Writes shards with mergekit's own writer; what routing decides about waits on disk.

    Attributes:
        parameters: how many were written.
        dtype: the widest floating-point one that was written; None if there was none.
    """

    def __init__(self, out: Path, options: MergeOptions) -> None:
        """
        Args:
            out: an existing directory.
            options: for the size of shards, and whether other threads write them.
        """
        self.parameters = 0
        self.dtype: torch.dtype | None = None
        self._clone = options.clone_tensors
        self._writer = TensorWriter(
            str(out),
            max_shard_size=options.out_shard_size,
            use_async=options.async_write,
            max_write_threads=options.write_threads,
        )
        self._waiting: dict[str, Path] = {}
        self._scratch = tempfile.TemporaryDirectory(dir=out)

    def write(self, name: str, versions: DenseVersions) -> None:
        """Write a weight, or keep both versions on disk until `finish` knows which one is right."""
        first = versions.averaged
        self.parameters += first.numel()
        if first.is_floating_point():
            self.dtype = torch.promote_types(self.dtype or first.dtype, first.dtype)
        if versions.routed is first:
            self._writer.save_tensor(name, first, clone=self._clone)
            return
        self._waiting[name] = Path(self._scratch.name, f"{len(self._waiting)}.safetensors")
        save_file({"averaged": first, "routed": versions.routed}, self._waiting[name])

    def finish(self, routed: Container[str]) -> None:
        """Write what waited, in the version that routing asks for, and complete the checkpoint."""
        for name, path in self._waiting.items():
            with safe_open(path, framework="pt") as file:
                weight = file.get_tensor("routed" if name in routed else "averaged").clone()
            self._writer.save_tensor(name, weight, clone=self._clone)
        self._writer.finalize()
        self._scratch.cleanup()
