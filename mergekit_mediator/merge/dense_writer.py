"""The dense expert's checkpoint, written weight by weight, even while routing is undecided."""

import tempfile
from collections.abc import Container
from pathlib import Path

import torch
from mergekit.io.tensor_writer import TensorWriter
from mergekit.options import MergeOptions
from safetensors import safe_open
from safetensors.torch import save_file

from mergekit_mediator.merge.measured import DenseVersions


class DenseWriter:
    """A writer of shards, which wraps mergekit's. Weights that depend on routing wait on disk in two versions.

    Attributes:
        parameters: the number of parameters so far.
        dtype: the widest floating-point dtype so far; None without floating-point weights.
    """

    def __init__(self, out: Path, options: MergeOptions) -> None:
        """Open the checkpoint.

        Args:
            out: an existing directory.
            options: mergekit's options. They set the size of shards, and the threads that write them.
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
        """Write a weight, or keep its two versions on disk until `finish` chooses one.

        Args:
            name: the name of the weight.
            versions: the weight for each outcome of routing.
        """
        averaged = versions.averaged
        self.parameters += averaged.numel()
        if averaged.is_floating_point():
            self.dtype = torch.promote_types(self.dtype or averaged.dtype, averaged.dtype)
        if versions.routed is averaged:
            self._writer.save_tensor(name, averaged, clone=self._clone)
            return
        self._waiting[name] = Path(self._scratch.name, f"{len(self._waiting)}.safetensors")
        save_file({"averaged": averaged, "routed": versions.routed}, self._waiting[name])

    def finish(self, routed: Container[str]) -> None:
        """Write the weights that waited and complete the checkpoint.

        Args:
            routed: the names of the routed weights.
        """
        for name, path in self._waiting.items():
            with safe_open(path, framework="pt") as file:
                weight = file.get_tensor("routed" if name in routed else "averaged").clone()
            self._writer.save_tensor(name, weight, clone=self._clone)
        self._writer.finalize()
        self._scratch.cleanup()
