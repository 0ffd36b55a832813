"""The merge method `mediator`, which returns the dense expert alone where mergekit merges in memory."""

import logging
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from pydantic import Field

from mergekit_mediator.methods.mediator_dense import REFERENCE, SCALE, SHARE, MediatorDense

METHOD = "mediator"
_DENSITY = ParameterSpec(
    "density", Annotated[float, Field(gt=0, le=1)], ParameterScope.NON_BASE, default=0.1
)
_LOG = logging.getLogger(__name__)


class Mediator(MediatorDense):
    """The name and the parameters of `mediator`, and its merge in memory.

    A merge method sees one tensor at a time and returns one tensor; an artifact needs all layers and
    several files. So `run_merge` writes artifacts, see `merge.plugin`. Where mergekit merges tensors in
    memory, this method returns the dense expert of averaged layers, as `mediator_dense` does.
    """

    spec = MergeMethodSpec(
        name=METHOD,
        pretty_name="Mediator",
        reference_url=REFERENCE,
        parameters=(SHARE, SCALE, _DENSITY),
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
    )

    def __call__(self, groups: Sequence[TensorGroup], **options: Any) -> tuple[torch.Tensor, ...]:
        """Merge in memory, and warn that this merge writes no experts."""
        _LOG.warning(
            "merge_method mediator: a merge in memory returns the dense expert alone, as mediator_dense does: "
            "to write experts, use mergekit-yaml, mergekit-mediator merge or mergekit.merge.run_merge"
        )
        merged: tuple[torch.Tensor, ...] = super().__call__(groups, **options)
        return merged
