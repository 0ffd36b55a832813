"""The pass that measures every weight and writes the dense expert; it gives the plan of the layers."""

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
from mergekit_mediator.merge.passes import Measured, Passes
from mergekit_mediator.merge.planner import PlannedWeight
from mergekit_mediator.merge.preparation import Preparation


@dataclass(frozen=True)
class DensePass:
    """The outcome of the pass.

    Attributes:
        plans: the layers, decided.
        measured: by the name of the weight.
        directions: by weight, `[n_experts, rank, in]` float16, of those that the response router measures.
        parameter_count: of the dense expert.
    """

    plans: Sequence[LayerPlan]
    measured: Mapping[str, Measured]
    directions: Mapping[str, Tensor]
    parameter_count: int

    def routed(self, weights: Sequence[PlannedWeight]) -> list[PlannedWeight]:
        """The weights of the routed layers."""
        return routed_weights(weights, self.plans)


def write_dense(passes: Passes, preparation: Preparation[OpenInputs], out: Path) -> DensePass:
    """Measure all weights, decide about the layers, and write the dense expert's checkpoint.

    Args:
        passes: over the models.
        preparation: of the merge.
        out: the directory of the artifact, with the model's configuration.
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
        del averaged  # its dense versions are written
    plans = preparation.plan_layers({name: m.conflict for name, m in measured.items()})
    writer.finish({weight.info.name for weight in routed_weights(weights, plans)})
    if inputs.out_dtype is None and writer.dtype is not None:
        # mergekit names the base's, in which wider weights would be loaded
        inputs.out_config.dtype = writer.dtype
        write_config(inputs, out)
    return DensePass(plans, measured, directions, writer.parameters)


def routed_weights(
    weights: Sequence[PlannedWeight], plans: Sequence[LayerPlan]
) -> list[PlannedWeight]:
    """The weights of the layers that are routed."""
    layers = {plan.name for plan in plans if plan.routed}
    return [weight for weight in weights if weight.layer in layers]


def _costed(
    config: MediatorConfig, weights: Sequence[PlannedWeight], routed: frozenset[str] | None
) -> frozenset[str]:
    """The weights of which `bits` or a `budget` must know what storing them costs."""
    if not config.needs_costs:
        return frozenset()
    return frozenset(weight.info.name for weight in weights) if routed is None else routed
