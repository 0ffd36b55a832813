"""The weights of a merge by layer, each with its parameters, from mergekit's architecture definitions."""

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
    """One weight of the output, with its parameters.

    Attributes:
        info: mergekit's definition: name, aliases, vocabulary axis.
        layer: the name of its layer.
        inputs: mergekit's task that loads it from every model.
        names: its definition in each model.
        scale: λ, if its layer is averaged.
        shares: w_t, the weight of each expert in the mean.
        densities: the fraction in (0, 1] of its coordinates that each sparse expert keeps.
    """

    info: WeightInfo
    layer: str
    inputs: Task[Any]
    names: dict[ModelReference, WeightInfo]
    scale: float
    shares: dict[ModelReference, float]
    densities: dict[ModelReference, float]

    @property
    def is_aligned(self) -> bool:
        """Whether mergekit aligns its rows to one vocabulary."""
        return not isinstance(self.inputs, GatherTensors)


class Planner(MergePlanner):  # type: ignore[misc]
    """mergekit's planner, which also collects every weight with its layer and its parameters.

    Attributes:
        planned: the weights in the model's order.
    """

    def __init__(
        self,
        merge_config: MergeConfiguration,
        architecture: ModelArchitecture,
        options: MergeOptions,
        out_config: transformers.PretrainedConfig,
        models: Sequence[ModelReference],
        experts: Sequence[ModelReference],
    ) -> None:
        """Prepare to plan.

        Args:
            merge_config: the configuration, as for mergekit's planner.
            architecture: mergekit's definition of the architecture.
            options: mergekit's options.
            out_config: the model configuration of the dense expert.
            models: the base and the experts; every slice must have each of them.
            experts: the experts, in order.
        """
        super().__init__(merge_config, architecture, options, out_config)
        self._models, self._experts = models, experts
        self._prefix = self._layer = ""
        self.planned: list[PlannedWeight] = []

    def plan_module(self, module_name: str, definition: Any) -> None:
        """Plan a module, whose first weights are those of the layer `embed`.

        Raises:
            ConfigError: a slice lacks a model, or its models differ in `layer_range`.
        """
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
                raise ConfigError(f"slices: a slice lacks {model}: add every model to each slice")
        if len({tuple(source.layer_range) for source in sources}) > 1:
            raise ConfigError(
                "slices: all models of a slice must have the same layer_range, and without slices the same "
                "number of layers: the merge compares layer i of an expert with layer i of the base"
            )

    def plan_slice(self, definition: Any, module_def: Any, module_name: str) -> None:
        """Plan a slice; the weights after the last one are those of the layer `final`."""
        super().plan_slice(definition, module_def, module_name)
        self._layer = f"{self._prefix}final"

    def plan_layer(self, *args: Any, **kwargs: Any) -> None:
        """Plan a decoder block, whose layer has the block's number as its name."""
        self._layer = f"{self._prefix}{self._current_module_layers}"
        super().plan_layer(*args, **kwargs)

    def plan_tensor(
        self,
        weight: WeightInfo,
        weights_in: list[WeightInfo],
        models: list[ModelReference],
        cfg_reader: ConfigReader,
    ) -> None:
        """Plan one weight, unless it is tied to another one.

        Raises:
            ConfigError: all experts have `weight` 0.
        """
        if weight.tied_names and is_tied(self.out_model_config):
            return  # the plan has this weight under its other name
        count = len(self._tensors)
        super().plan_tensor(weight, weights_in, models, cfg_reader)
        for _, task in self._tensors[count:]:
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
                raise ConfigError(
                    f"weight: a sum above 0 required, but all are 0 for {weight.name}: raise one"
                )
            self.planned.append(planned)


def is_tied(config: transformers.PretrainedConfig) -> bool:
    """Tell whether input and output embedding are one weight."""
    return bool(getattr(config, "tie_word_embeddings", False))
