"""Hold the stored experts while they are not in place: on the device, in host memory, or on disk."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from threading import Lock
from typing import Literal, get_args

import torch
from torch import Tensor

from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.errors import MixtureError
from mergekit_mediator.store.expert_file import ExpertFile
from mergekit_mediator.store.expert_files import ExpertFiles

Residency = Literal["device", "cpu", "disk"]


class Experts:
    """The stored experts of an artifact; each weight is decoded at its first use.

    Files are memory-mapped. Decoded weights stay in memory, on the device of the dense weight (`device`) or in
    host memory (`cpu`, pinned where there is CUDA). If they exceed `budget` bytes, the weights that were used
    least recently go. With `disk` no decoded weight stays: every use decodes it.
    """

    def __init__(
        self,
        files: Mapping[str, ExpertFile],
        dense: Callable[[str], Tensor],
        residency: Residency = "device",
        budget: int | None = None,
    ) -> None:
        """Decode nothing yet.

        Args:
            files: the experts' files by name; a file is opened when a caller asks for it.
            dense: returns a dense weight of the checkpoint by its name.
            residency: see above.
            budget: the bytes that decoded weights of all experts together may take; None is no limit.

        Raises:
            MixtureError: the residency is unknown, or the budget is not positive.
        """
        if residency not in get_args(Residency):
            names = ", ".join(get_args(Residency))
            raise MixtureError(f"residency must be one of {names}, got {residency!r}")
        if budget is not None and (not isinstance(budget, int) or budget <= 0):
            raise MixtureError(
                f"expert_budget must be a positive number of bytes, or None, got {budget!r}"
            )
        self.files, self.residency, self.budget = files, residency, budget
        self.dense = dense
        self._decoded: OrderedDict[tuple[str, str], StoredWeight] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    @property
    def is_bounded(self) -> bool:
        """Whether decoded weights are the only tensors that may take memory."""
        return self.residency != "device" or self.budget is not None

    @property
    def resident_bytes(self) -> int:
        """The bytes that decoded weights take now."""
        return self._bytes

    def needed(self, names: Iterable[str]) -> list[str]:
        """The experts whose files a mixture of these needs; see `ExpertFiles.needed`."""
        if isinstance(self.files, ExpertFiles):
            return self.files.needed(names)
        return list(self.files)

    def read(self, expert: str, weight: str, device: torch.device) -> StoredWeight:
        """Return an expert's stored weight on a device. Several threads may call this at once.

        Raises:
            ArtifactError: the file's content differs from its header.
        """
        key = (expert, weight)
        with self._lock:
            stored = self._decoded.get(key)
            if stored is not None:
                self._decoded.move_to_end(key)
        if stored is None:
            stored = self.files[expert].read(weight, self.dense(weight)).without_zeros()
            if self.residency == "device":
                stored = stored.to(device)
            elif self.residency == "cpu" and device.type == "cuda":
                stored = _each(stored, Tensor.pin_memory)
            if self.residency != "disk":
                self._keep(key, stored)
        if stored.positions.device == device:
            return stored
        # From pinned memory the copy is only started; work on the same stream waits for it.
        return _each(stored, lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def drop(self) -> None:
        """Forget all decoded weights."""
        with self._lock:
            self._decoded.clear()
            self._bytes = 0

    def _keep(self, key: tuple[str, str], stored: StoredWeight) -> None:
        size = stored_bytes(stored)
        # Interrupts fall on calls: no call stands between storing a weight and counting its bytes.
        with self._lock:
            if key not in self._decoded:
                self._decoded[key] = stored
                self._bytes += size
            while self.budget is not None and self._bytes > self.budget:
                oldest, evicted = next(iter(self._decoded.items()))
                size = stored_bytes(evicted)
                del self._decoded[oldest]
                self._bytes -= size


def stored_bytes(stored: StoredWeight) -> int:
    """Count the bytes of a decoded weight."""
    return sum(tensor_bytes(tensor) for tensor in _tensors(stored))


def tensor_bytes(tensor: Tensor) -> int:
    """Count the bytes of a dense or compressed sparse tensor."""
    if tensor.layout is torch.sparse_csr:
        parts = (tensor.crow_indices(), tensor.col_indices(), tensor.values())
        return sum(tensor_bytes(part) for part in parts)
    return tensor.numel() * tensor.element_size()


def _tensors(stored: StoredWeight) -> list[Tensor]:
    tensors = [stored.positions, stored.codes]
    if stored.factors is not None:
        tensors += [stored.factors.left, stored.factors.right, stored.factors.scales]
    return tensors


def _each(stored: StoredWeight, function: Callable[[Tensor], Tensor]) -> StoredWeight:
    """Replace every tensor of a stored weight by the function's result for it."""
    factors = stored.factors
    if factors is not None:
        left, right, scales = map(function, (factors.left, factors.right, factors.scales))
        factors = replace(factors, left=left, right=right, scales=scales)
    positions, codes = function(stored.positions), function(stored.codes)
    return replace(stored, positions=positions, codes=codes, factors=factors)
