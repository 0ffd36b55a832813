"""The change that a mixture makes to each weight of the checkpoint that is served."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from mergekit_mediator.delta.mixing import mix_
from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.errors import ExportError
from mergekit_mediator.models.loading import DenseCheckpoint
from mergekit_mediator.store.expert_file import open_expert
from mergekit_mediator.store.manifest import Manifest, read_manifest

# The model that a change is added to: the dense expert, or the base as far as the artifact knows it.
Reference = Literal["dense", "base"]


@dataclass(frozen=True)
class Change:
    """The sum Σ_t c_t Δ_t that a mixture adds to one weight.

    Attributes:
        weight: the weight's name in the checkpoint.
        shape: the weight's shape.
        parts: the coefficient c_t and the stored weight Δ_t of every expert that takes part.
    """

    weight: str
    shape: tuple[int, ...]
    parts: tuple[tuple[float, StoredWeight], ...]

    @property
    def is_factored(self) -> bool:
        """Whether every part is a product of thin factors alone."""
        return all(part.factors and not part.positions.numel() for _, part in self.parts)

    @property
    def is_noisy(self) -> bool:
        """Whether a part is signs at random coordinates, most of whose squared change is noise."""
        return any(part.values == "random_sign" for _, part in self.parts)

    def tensor(self, dense: Tensor) -> Tensor:
        """Return the change in the weight's shape, float32.

        Args:
            dense: the dense expert's weight.
        """
        flat = dense.reshape(-1)
        total = torch.zeros(flat.numel())
        for coefficient, part in self.parts:
            if part.positions.numel():
                difference = part.difference(flat.index_select(0, part.positions))
                total.index_add_(0, part.positions, difference, alpha=coefficient)
            if part.factors:
                total.add_(part.factors.product().reshape(-1), alpha=coefficient)
        return total.view(self.shape)


class StoredExperts:
    """The experts of an artifact, read weight by weight without a model.

    Attributes:
        root: the artifact's directory.
        reference: the model that changes are added to.
        manifest: the artifact's manifest.
        dense: the dense expert's checkpoint.
    """

    def __init__(self, root: Path, reference: Reference = "dense") -> None:
        """Open the experts' files.

        Args:
            root: the artifact's directory; the caller has verified its files.
            reference: the model that changes are added to. `base` needs experts that are stored relative
                to the base: with `reference: base`, with `bits`, with `budget`, or as factors of adapters.

        Raises:
            ArtifactError: the artifact cannot be read.
            ExportError: the reference is unknown, or is `base` and an expert is stored relative to the dense
                expert.
        """
        if reference not in get_args(Reference):
            names = " or ".join(get_args(Reference))
            raise ExportError(f"relative to {reference!r}: {names} is required")
        self.root, self.reference = root, reference
        self.manifest: Manifest = read_manifest(root)
        self.dense = DenseCheckpoint(root)
        self._files = {entry.name: open_expert(root, entry) for entry in self.manifest.experts}
        if reference == "base":
            self._refuse_differences_from_dense()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the experts, in the artifact's order."""
        return self.manifest.expert_names

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the weights that any expert changes, in the order of the layers."""
        stored = {weight for file in self._files.values() for weight in file.weights}
        ordered = (weight for layer in self.manifest.layers for weight in layer.weights)
        return tuple(dict.fromkeys(weight for weight in ordered if weight in stored))

    def changes(
        self, mixture: Mapping[str, float], among: Sequence[str] | None = None
    ) -> Iterator[Change]:
        """Read the change that a mixture makes, weight by weight.

        Args:
            mixture: a weight above 0 by expert.
            among: the names of the weights that are read; None for all.

        Yields:
            The change of each weight that the mixture changes.

        Raises:
            ExportError: an expert is unknown.
        """
        self.check_names(mixture)
        for weight in self.weights if among is None else among:
            change = self.change(weight, mixture)
            if change.parts:
                yield change

    def is_noisy(self, name: str) -> bool:
        """Whether an expert is stored as signs at random coordinates, most of whose squared change is noise."""
        return any(d.values == "random_sign" for d in self._files[name].weights.values())

    def check_names(self, names: Iterable[str]) -> None:
        """Refuse names that no expert has.

        Raises:
            ExportError: an expert is unknown.
        """
        for name in names:
            if name not in self._files:
                experts = ", ".join(self._files)
                raise ExportError(f"unknown expert {name!r}; this artifact has {experts}")

    def chosen(self, names: Sequence[str] | None) -> tuple[str, ...]:
        """List experts by name, each once; None stands for all.

        Raises:
            ExportError: an expert is unknown.
        """
        if names is None:
            return self.names
        self.check_names(names)
        return tuple(dict.fromkeys(names))

    def mixed(self, weight: str, mixture: Mapping[str, float]) -> Tensor:
        """Return a weight of the checkpoint under a mixture, in its stored dtype, as it is served.

        The experts are relative to the dense expert.
        """
        dense = self.dense.weight(weight)
        parts = self.change(weight, mixture).parts
        if parts:
            dense = dense.clone()
            mix_(dense, parts)
        return dense

    def change(self, weight: str, mixture: Mapping[str, float]) -> Change:
        """Read the change of one weight; it has no parts if the mixture does not change the weight."""
        total = sum(mixture.values()) if self.reference == "dense" else 0.0
        return self._sum(weight, mixture, total)

    def to_base(self, weight: str) -> Change:
        """Read the change from the dense expert's weight to the base's, as far as the artifact knows the base."""
        return self._sum(weight, {}, 1.0)

    def _sum(self, weight: str, mixture: Mapping[str, float], total: float) -> Change:
        """Read every expert's part of a change; `total` is Σ_t p_t, the weight of the experts' shares."""
        parts: list[tuple[float, StoredWeight]] = []
        shape: tuple[int, ...] = ()
        for name, file in self._files.items():
            description = file.weights.get(weight)
            if description is None:
                continue
            shape = description.shape
            if name in mixture or (description.share and total):
                stored = file.read(weight, self.dense.weight(weight))
                coefficient = stored.coefficient(mixture.get(name, 0.0), total)
                if coefficient:
                    parts.append((coefficient, stored))
        return Change(weight, shape, tuple(parts))

    def _refuse_differences_from_dense(self) -> None:
        """Refuse experts that are stored relative to the dense expert.

        Raises:
            ExportError: there is such an expert.
        """
        if self.manifest.parameters.get("reference") == "base":
            return
        for name, file in self._files.items():
            for weight, description in file.weights.items():
                if description.values != "steps" or self.manifest.merged_by is not None:
                    raise ExportError(
                        f"expert {name!r}: {weight} is stored relative to the dense expert: export "
                        "relative to dense, or merge again with `reference: base` and `bits` or a `budget`"
                    )
