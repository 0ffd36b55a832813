"""The pass that measures all weights, decides which layers are routed, and writes the dense expert."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mergekit_mediator.merge.checkpoint import write_config
from mergekit_mediator.merge.config import MediatorConfig
from mergekit_mediator.merge.dense_writer import DenseWriter
from mergekit_mediator.merge.layers import LayerPlan
from mergekit_mediator.merge.loaders import OpenInputs
from mergekit_mediator.merge.measured import Measured
from mergekit_mediator.merge.passes import Passes
from mergekit_mediator.merge.planner import PlannedWeight
from mergekit_mediator.merge.preparation import Preparation


@dataclass(frozen=True)
class DensePass:
    """The outcome of the pass.

    Attributes:
        plans: the plans of the layers in order, all decided.
        measured: the figures of each weight by name.
        directions: the experts' leading directions, `[n_experts, rank, in]` float16, by the name of each
            weight that the response router measures.
        parameter_count: the number of the dense expert's parameters.
    """

    plans: Sequence[LayerPlan]
    measured: Mapping[str, Measured]
    directions: Mapping[str, Tensor]
    parameter_count: int

    def routed(self, weights: Sequence[PlannedWeight]) -> list[PlannedWeight]:
        """Select the weights of the routed layers."""
        return routed_weights(weights, self.plans)


def write_dense(passes: Passes, preparation: Preparation[OpenInputs], out: Path) -> DensePass:
    """Measure all weights, decide which layers are routed, and write the dense expert's checkpoint.

    Args:
        passes: the passes over the models.
        preparation: the preparation of the merge.
        out: the directory of the artifact, with the model's configuration.

    Raises:
        InputError: see `Passes.average`.
    """
    inputs, weights = preparation.inputs, preparation.weights
    config, routed = inputs.config, None
    if not config.selection.needs_conflict:
        plans = preparation.plan_layers({})
        routed = frozenset(weight.info.name for weight in routed_weights(weights, plans))
    costed = _costed(config, weights, routed)
    writer = DenseWriter(out, inputs.options)
    measured, directions = {}, {}
    for weight, averaged in passes.average(weights, routed, costed):
        writer.write(weight.info.name, averaged.dense)
        measured[weight.info.name] = averaged.measured
        if averaged.directions:
            directions[weight.info.name] = torch.stack(averaged.directions)
        del averaged  # the dense versions are on disk
    plans = preparation.plan_layers({name: m.conflict for name, m in measured.items()})
    writer.finish({weight.info.name for weight in routed_weights(weights, plans)})
    if inputs.out_dtype is None and writer.dtype is not None:
        # mergekit wrote the base's dtype, and loaders would narrow wider weights to it
        inputs.out_config.dtype = writer.dtype
        write_config(inputs, out)
    return DensePass(plans, measured, directions, writer.parameters)


def routed_weights(
    weights: Sequence[PlannedWeight], plans: Sequence[LayerPlan]
) -> list[PlannedWeight]:
    """Select the weights of the layers that are routed, in order."""
    layers = {plan.name for plan in plans if plan.routed}
    return [weight for weight in weights if weight.layer in layers]


def _costed(
    config: MediatorConfig, weights: Sequence[PlannedWeight], routed: frozenset[str] | None
) -> frozenset[str]:
    """Name the weights whose costs `bits`, `budget` or `keep` requires: the routed ones, or all while undecided."""
    if not config.needs_costs:
        return frozenset()
    return frozenset(weight.info.name for weight in weights) if routed is None else routed
