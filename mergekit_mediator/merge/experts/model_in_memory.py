"""The model on which a merge tunes and measures: the dense expert, an expert, or what is served as this expert."""

from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from torch import Tensor

from mergekit_mediator.delta.mixing import mix_
from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.merge.loaders import OpenInputs
from mergekit_mediator.merge.planner import PlannedWeight
from mergekit_mediator.models.loading import load_plain
from mergekit_mediator.models.locate import locate_weights
from mergekit_mediator.store.expert_file import ExpertFile


class ModelInMemory:
    """One model in float32, whose weights are replaced in place.

    Attributes:
        model: the model; at first the dense expert.
    """

    def __init__(self, inputs: OpenInputs, weights: Sequence[PlannedWeight], out: Path) -> None:
        """Load the dense expert.

        Args:
            inputs: the models of the merge.
            weights: all weights of the merge.
            out: the directory of the dense expert, complete with its configuration.

        Raises:
            ArtifactError: the dense expert cannot be loaded as a causal language model.
            MixtureError: the loader of transformers converted the weights.
        """
        self._inputs, self._read_dense = inputs, inputs.reader(out)
        model: Any = load_plain(out, "float32", inputs.options.trust_remote_code)
        self.model = model.to(inputs.options.device or "cpu")
        shapes, self._floating = {}, []
        for weight in weights:
            dense = self._read_dense(weight.info.name)
            if dense.is_floating_point():
                shapes[weight.info.name] = tuple(dense.shape)
                self._floating.append(weight)
        self._places = locate_weights(self.model, shapes, shapes)

    def become(self, model: ModelReference) -> None:
        """Take the own weights of an expert or of the base."""
        for weight in self._floating:
            self._places[weight.info.name].copy_(self._inputs.load(weight, model))

    def become_dense(self) -> None:
        """Take the weights of the dense expert."""
        for weight in self._floating:
            self._places[weight.info.name].copy_(self._read_dense(weight.info.name))

    def become_stored(
        self, expert: ModelReference, files: Mapping[ModelReference, ExpertFile]
    ) -> None:
        """Take the weights that are served as one expert.

        Args:
            expert: the expert.
            files: the file of each expert.
        """
        for weight in self._floating:
            place, dense = self._places[weight.info.name], self._read_dense(weight.info.name)
            versions = {
                other: file.read(weight.info.name, dense)
                for other, file in files.items()
                if weight.info.name in file.weights
            }
            place.copy_(dense)
            parts = [
                (stored.coefficient(float(other == expert), 1.0), stored.to(place.device))
                for other, stored in versions.items()
            ]
            if parts:
                mix_(place, parts)

    def stored(self, file: ExpertFile) -> dict[str, StoredWeight]:
        """Read all weights that an expert's file stores, by name."""
        return {name: file.read(name, self._read_dense(name)) for name in file.weights}

    def changes(
        self, expert: ModelReference, names: Container[str]
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield the name of each named weight, its place in the model, and the change that the expert stores of it."""
        load, is_merged = self._inputs.load, self._inputs.config.reference_is_merged
        for weight in self._floating:
            name = weight.info.name
            if name in names:
                place = self._places[name]
                reference = self._read_dense(name) if is_merged else load(weight, self._inputs.base)
                yield name, place, load(weight, expert).to(place) - reference.to(place)
