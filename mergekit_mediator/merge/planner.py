"""mergekit's architecture definitions -> the weights of each layer, and what is done with each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from mergekit.architecture import ModelArchitecture, WeightInfo
from mergekit.common import ModelReference
from mergekit.config import ConfigReader, InputSliceDefinition, MergeConfiguration
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from mergekit_mediator.errors import ConfigError


@dataclass(frozen=True)
class PlannedWeight:
    """One weight of the output, and what is done with it.

    Attributes:
        info: mergekit's definition: name, aliases, vocabulary axis.
        layer: the name of its layer.
        inputs: the task that loads it from every model.
        names: what it is called in each model.
        scale: λ of averaged layers.
        shares: the expert's weight in the mean, by model.
        densities: the fraction that a sparse expert keeps, by model.
        importance: of a squared error in it, to a budget; see `layers.importance`.
    """

    info: WeightInfo
    layer: str
    inputs: Task[Any]
    names: dict[ModelReference, WeightInfo]
    scale: float
    shares: dict[ModelReference, float]
    densities: dict[ModelReference, float]
    importance: float = 1.0

    @property
    def is_aligned(self) -> bool:
        """Whether mergekit brings its rows to one vocabulary when it loads it."""
        return not isinstance(self.inputs, GatherTensors)


class Planner(MergePlanner):  # type: ignore[misc]
    """mergekit's planner, which also notes the layer of each weight and keeps loading from merging."""

    def __init__(
        self,
        merge_config: MergeConfiguration,
        architecture: ModelArchitecture,
        options: MergeOptions,
        out_config: transformers.PretrainedConfig,
        models: Sequence[ModelReference],
        experts: Sequence[ModelReference],
    ) -> None:
        """
        Args:
            merge_config, architecture, options, out_config: as for mergekit's planner.
            models: all inputs, the base among them; every slice needs each.
            experts: the inputs but the base, in order.
        """
        super().__init__(merge_config, architecture, options, out_config)
        self._models, self._experts = models, experts
        self._prefix = self._layer = ""
        self.planned: list[PlannedWeight] = []

    def plan_module(self, module_name: str, definition: Any) -> None:
        prefix = f"{module_name}." if len(self.arch_info.modules) > 1 else ""
        self._prefix = prefix
        self._layer = f"{prefix}embed"
        for output in definition.slices:
            self._check_slice(output.sources)
        super().plan_module(module_name, definition)

    def _check_slice(self, sources: list[InputSliceDefinition]) -> None:
        models = {source.model for source in sources}
        for model in self._models:
            if model not in models:
                raise ConfigError(f"slices: {model} is missing from one: each needs every model")
        if len({tuple(source.layer_range) for source in sources}) > 1:
            raise ConfigError(
                "slices: all models of one slice need the same layer_range: layer i of an expert "
                "is compared with layer i of the base"
            )

    def plan_slice(self, definition: Any, module_def: Any, module_name: str) -> None:
        super().plan_slice(definition, module_def, module_name)
        self._layer = f"{self._prefix}final"

    def plan_layer(self, *args: Any, **kwargs: Any) -> None:
        self._layer = f"{self._prefix}{self._current_module_layers}"
        super().plan_layer(*args, **kwargs)

    def plan_tensor(
        self,
        weight: WeightInfo,
        weights_in: list[WeightInfo],
        models: list[ModelReference],
        cfg_reader: ConfigReader,
    ) -> None:
        if weight.tied_names and is_tied(self.out_model_config):
            return  # the same weight as the one it is tied to
        before = len(self._tensors)
        super().plan_tensor(weight, weights_in, models, cfg_reader)
        for _, task in self._tensors[before:]:
            by_model = {m: task.input_parameters[m] for m in self._experts}
            planned = PlannedWeight(
                info=weight,
                layer=self._layer,
                inputs=task.gather_tensors,
                names=dict(zip(models, weights_in, strict=True)),
                scale=task.parameters["lambda"],
                shares={m: p["weight"] for m, p in by_model.items()},
                densities={m: p["density"] for m, p in by_model.items()},
            )
            if sum(planned.shares.values()) <= 0:
                raise ConfigError(f"weight: those of all experts are 0 for {weight.name}")
            self.planned.append(planned)


def is_tied(config: transformers.PretrainedConfig) -> bool:
    """Whether input and output embedding are one weight."""
    return bool(getattr(config, "tie_word_embeddings", False))
