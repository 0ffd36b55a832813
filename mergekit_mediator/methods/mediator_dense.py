"""The merge method `mediator_dense`: θ_0 + λ·Σ_t w_t τ_t / Σ_t w_t, the dense expert of averaged layers."""

from collections.abc import Sequence
from typing import Any

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    BatchOptions,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)

from mergekit_mediator.delta.narrow import check_range, narrowed
from mergekit_mediator.errors import ConfigError
from mergekit_mediator.methods.weighted_mean import average

REFERENCE = "https://arxiv.org/abs/2502.04411"
SHARE = ParameterSpec("weight", float, ParameterScope.NON_BASE, default=1.0)
SCALE = ParameterSpec("lambda", float, ParameterScope.SHARED, default=1.0)


class MediatorDense(GroupMergeMethod):  # type: ignore[misc]
    """The dense expert alone: one ordinary checkpoint without experts."""

    spec = MergeMethodSpec(
        name="mediator_dense",
        pretty_name="Mediator (dense expert)",
        reference_url=REFERENCE,
        parameters=(SHARE, SCALE),
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
    )

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Merge as mergekit does, but refuse finite numbers that a dtype makes infinite.

        Raises:
            InputError: a number is beyond the range of `dtype` or `out_dtype`.
        """
        results = []
        for group, settings, dtype in zip(groups, parameters, input_dtypes, strict=True):
            name = group.metadata.name or "weight"
            for entry in group.entries:
                check_range(entry.tensor, dtype or entry.tensor.dtype, f"{name} of {entry.id}")
            (result,) = super()._execute((group,), [settings], options, input_dtypes=[dtype])
            results.append(result if out_dtype is None else narrowed(result, out_dtype, name))
        return tuple(results)

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        """Add λ times the weighted mean of the task vectors to the base.

        Args:
            group: one weight of the base and of every expert, all of one shape.
            parameters: `weight`, a number by expert, and `lambda`, one number.

        Returns:
            A tensor of the base's shape and dtype.

        Raises:
            ConfigError: the sum of the weights is not above 0.
            InputError: a number of the result is beyond the range of its dtype.
        """
        shares, scale = parameters["weight"], parameters["lambda"]
        weights = [shares[entry.id] for entry in group.non_base]
        base, name = group.base.tensor, group.metadata.name or "weight"
        if sum(weights) <= 0:
            raise ConfigError(
                f"weight: a sum above 0 required over all experts, got {sum(weights)} for {name}: raise one"
            )
        experts = [entry.tensor for entry in group.non_base]
        return average(base, experts, weights, scale, base.dtype, name, str(base.device))
