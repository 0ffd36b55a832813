"""Where stored experts live while they are not in place: on the device, in host memory, or on disk."""

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
    """The stored experts of an artifact, weight by weight, each decoded when it is first needed.

    Files are memory-mapped. What is decoded stays in memory, on the device of its weight (`device`)
    or in host memory (`cpu`, pinned where there is CUDA), until `budget` bytes are exceeded; then what
    was used least recently goes. `disk` keeps nothing and decodes at every use.
    """

    def __init__(
        self,
        files: Mapping[str, ExpertFile],
        dense: Callable[[str], Tensor],
        residency: Residency = "device",
        budget: int | None = None,
    ) -> None:
        """
        Args:
            files: the experts by name, which are opened when they are asked for.
            dense: gives a dense weight as it is in the checkpoint.
            residency: see above.
            budget: bytes that decoded weights may take, all experts together; None is no limit.

        Raises:
            MixtureError: an unknown residency, or a budget that is not positive.
        """
        if residency not in get_args(Residency):
            names = ", ".join(get_args(Residency))
            raise MixtureError(f"residency must be one of {names}, got {residency!r}")
        if budget is not None and (not isinstance(budget, int) or budget <= 0):
            raise MixtureError(
                f"the expert budget must be a positive number of bytes, got {budget!r}"
            )
        self.files, self.residency, self.budget = files, residency, budget
        self.dense = dense
        self._kept: OrderedDict[tuple[str, str], StoredWeight] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    @property
    def is_bounded(self) -> bool:
        """Whether no memory may be taken beyond that of the decoded weights."""
        return self.residency != "device" or self.budget is not None

    @property
    def resident_bytes(self) -> int:
        """What the decoded weights take now."""
        return self._bytes

    def needed(self, names: Iterable[str]) -> list[str]:
        """The experts whose files a mixture of these needs; see `ExpertFiles.needed`."""
        if isinstance(self.files, ExpertFiles):
            return self.files.needed(names)
        return list(self.files)

    def read(self, expert: str, weight: str, device: torch.device) -> StoredWeight:
        """What an expert keeps of a weight, on a device. Threads may call this at the same time.

        Raises:
            ArtifactError: the file does not hold what its header says.
        """
        key = (expert, weight)
        with self._lock:
            stored = self._kept.get(key)
            if stored is not None:
                self._kept.move_to_end(key)
        if stored is None:
            stored = self.files[expert].read(weight, self.dense(weight))
            if self.residency == "device":
                stored = stored.to(device)
            elif self.residency == "cpu" and device.type == "cuda":
                stored = _each(stored, Tensor.pin_memory)
            if self.residency != "disk":
                self._keep(key, stored)
        if stored.positions.device == device:
            return stored
        # from pinned memory the copy is only started; what uses it on the same stream comes after it
        return _each(stored, lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def drop(self) -> None:
        """Forget everything that was decoded."""
        with self._lock:
            self._kept.clear()
            self._bytes = 0

    def _keep(self, key: tuple[str, str], stored: StoredWeight) -> None:
        size = stored_bytes(stored)
        with self._lock:  # an interrupt falls on a call: none between a weight and its bytes
            if key not in self._kept:
                self._kept[key] = stored
                self._bytes += size
            while self.budget is not None and self._bytes > self.budget:
                oldest, evicted = next(iter(self._kept.items()))
                size = stored_bytes(evicted)
                del self._kept[oldest]
                self._bytes -= size


def stored_bytes(stored: StoredWeight) -> int:
    """The memory that a decoded weight takes."""
    return sum(tensor_bytes(tensor) for tensor in _tensors(stored))


def tensor_bytes(tensor: Tensor) -> int:
    """The memory that a dense or compressed sparse tensor takes."""
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
    """The same stored weight with every tensor replaced."""
    factors = stored.factors
    if factors is not None:
        left, right, scales = map(function, (factors.left, factors.right, factors.scales))
        factors = replace(factors, left=left, right=right, scales=scales)
    positions, codes = function(stored.positions), function(stored.codes)
    return replace(stored, positions=positions, codes=codes, factors=factors)
