"""The base class of methods of task vectors: the base model plus λ times one merged task vector, in float32."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from pydantic import Field
from torch import Tensor

from mergekit_mediator.delta.full_precision import full_precision
from mergekit_mediator.delta.narrow import check_range, narrowed

Finite = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1)]
WEIGHT = ParameterSpec("weight", Finite, ParameterScope.NON_BASE, default=1.0)
LAMBDA = ParameterSpec("lambda", Finite, ParameterScope.SHARED, default=1.0)


def shared(name: str, value_type: Any, default: Any) -> ParameterSpec:
    """A parameter that all experts share; mergekit resolves its filters and gradients."""
    return ParameterSpec(name, value_type, ParameterScope.SHARED, default=default)


def task_vector_spec(
    name: str, pretty_name: str, paper: str, *parameters: ParameterSpec
) -> MergeMethodSpec:
    """The description of a method that needs a base model and takes `weight`, `lambda` and its own.

    Args:
        name: as `merge_method` gives it.
        pretty_name: for model cards.
        paper: its address.
        parameters: those of this method alone.
    """
    return MergeMethodSpec(
        name=name,
        pretty_name=pretty_name,
        reference_url=paper,
        parameters=(WEIGHT, LAMBDA, *parameters),
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
    )


@dataclass(frozen=True)
class ModelWeight:
    """One weight of the base model and of all experts.

    Attributes:
        name: for error messages, and where a method treats embeddings apart.
        base: `[*shape]`, any floating dtype.
        taus: the task vectors `[experts, *shape]` float32, each times the `weight` of its expert.
    """

    name: str
    base: Tensor
    taus: Tensor

    @property
    def is_matrix(self) -> bool:
        """Whether it has rows and columns, so that it can be decomposed."""
        return self.base.ndim == 2


@dataclass(frozen=True)
class UnreadWeight:
    """One weight before it is read.

    Attributes:
        name: of the weight.
        shape: of the weight; None where no header tells it.
        parameters: resolved for this weight, by name; `weight` is by expert.
    """

    name: str
    shape: tuple[int, ...] | None
    parameters: Mapping[str, Any]


class TaskVectorMethod(GroupMergeMethod):  # type: ignore[misc]
    """A merge method that combines the task vectors of two experts or more into one.

    A single expert has no other to interfere with: its task vector is kept as it is.
    """

    def check(self, weights: Sequence[UnreadWeight]) -> None:
        """Refuse parameters that do not fit the weights, before any is read.

        Args:
            weights: all of the merge.

        Raises:
            ConfigError: which parameter of which weight, and what to do.
        """

    @abstractmethod
    def combine(self, weight: ModelWeight, parameters: Mapping[str, Any]) -> Tensor:
        """Combine the task vectors of at least two experts.

        Args:
            weight: with at least one value; its tensors must not be changed.
            parameters: of this weight, by name.

        Returns:
            The merged task vector `[*shape]` float32, which the caller may change.

        Raises:
            ConfigError: a parameter does not fit this weight.
        """

    def _bind_parameters(
        self, groups: Sequence[TensorGroup], parameters: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Bind the parameters of a merge in memory, as mergekit does, and check them."""
        bound: list[dict[str, Any]] = super()._bind_parameters(groups, parameters)
        self.check(
            [
                UnreadWeight(name_of(group), tuple(group.base.tensor.shape), of_group)
                for group, of_group in zip(groups, bound, strict=True)
            ]
        )
        return bound

    @torch.no_grad()
    @full_precision()
    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Merge one weight.

        Raises:
            ConfigError: a parameter does not fit this weight.
            InputError: a finite number of the result is infinite in the dtype of the base.
        """
        base: Tensor = group.base.tensor
        if not base.numel():
            return base
        weight = model_weight(group, parameters)
        merged = weight.taus[0] if len(weight.taus) == 1 else self.combine(weight, parameters)
        del weight  # the task vectors are as large as all inputs
        return narrowed(merged.mul_(parameters["lambda"]).add_(base), base.dtype, name_of(group))


def model_weight(group: TensorGroup, parameters: Mapping[str, Any]) -> ModelWeight:
    """Compute the task vectors of one weight.

    Args:
        group: with the base and at least one expert.
        parameters: with `weight` by expert.

    Raises:
        InputError: a magnitude is beyond float32.
    """
    name, base = name_of(group), group.base.tensor
    taus = torch.empty((len(group.non_base), *base.shape), device=base.device)
    for tau, entry in zip(taus, group.non_base, strict=True):
        check_range(entry.tensor, torch.float32, f"{name} of {entry.id}")
        tau.copy_(entry.tensor).sub_(base)
        scale = parameters["weight"][entry.id]
        if scale != 1:
            tau.mul_(scale)
    return ModelWeight(name, base, taus)


def name_of(group: TensorGroup) -> str:
    """The name of a weight, for error messages."""
    return group.metadata.name or "weight"


def mean(weight: ModelWeight) -> Tensor:
    """The mean of the task vectors: what methods of matrices do with norms and biases."""
    return weight.taus.mean(dim=0)
