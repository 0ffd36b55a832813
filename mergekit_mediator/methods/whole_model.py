"""Methods that need figures of the whole model before they merge the first weight."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

import torch
from mergekit.merge_methods.base import TensorGroup
from torch import Tensor

from mergekit_mediator.errors import ConfigError
from mergekit_mediator.methods.task_vector_method import (
    ModelWeight,
    TaskVectorMethod,
    UnreadWeight,
    model_weight,
)

# The name under which a method finds its figures among the parameters of a weight.
FIGURES = "figures"


class ModelWeights(Protocol):
    """All weights of the models. Each time it is gone through, the models are read once.

    Attributes:
        scratch: holds tensors by name until the merge ends, outside of memory; None where there is no such place.
    """

    scratch: MutableMapping[str, Tensor] | None

    def __iter__(self) -> Iterator[tuple[ModelWeight, Mapping[str, Any]]]:
        """Every weight that has values, with its parameters."""
        ...


class WholeModelMethod(TaskVectorMethod):
    """A method with figures of the whole model, which it measures in passes before the merge.

    Attributes:
        whole: the parameters that enter the figures, and so have one value for all weights.
    """

    whole: tuple[str, ...] = ()

    @abstractmethod
    def measure(self, weights: ModelWeights, parameters: Mapping[str, Any]) -> Any:
        """Measure the figures of the whole model.

        Args:
            weights: of all models; at least one.
            parameters: those of `whole`, and what else the first weight has.

        Returns:
            What `combine` finds as `parameters["figures"]`.
        """

    def check(self, weights: Sequence[UnreadWeight]) -> None:
        """Refuse a parameter of the whole model that is not the same everywhere."""
        for name in self.whole:
            values = sorted({weight.parameters[name] for weight in weights})
            if len(values) > 1:
                raise ConfigError(
                    f"{name}: one value required, as {self.spec.name} compares all weights of the model, "
                    f"got {values[0]} and {values[-1]}: leave out filters and gradients"
                )

    def _bind_parameters(
        self, groups: Sequence[TensorGroup], parameters: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Bind the parameters of a merge in memory, and measure its figures."""
        bound = super()._bind_parameters(groups, parameters)
        with torch.no_grad():
            figures = self.measure(_InMemory(groups, bound), bound[0]) if groups else None
        return [{**of_group, FIGURES: figures} for of_group in bound]

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Merge one weight; see `TaskVectorMethod`.

        Raises:
            ConfigError: nobody measured the figures of the whole model.
        """
        if FIGURES not in parameters:
            raise ConfigError(
                f"merge_method {self.spec.name}: figures of the whole model required, but this command merges "
                "weight by weight: use mergekit-yaml or mergekit.merge_methods.merge_state_dicts"
            )
        return super().merge_group(group, **parameters)


class _InMemory:
    """The weights of models that are in memory."""

    scratch: MutableMapping[str, Tensor] | None = None

    def __init__(
        self, groups: Sequence[TensorGroup], parameters: Sequence[Mapping[str, Any]]
    ) -> None:
        self._groups, self._parameters = groups, parameters

    def __iter__(self) -> Iterator[tuple[ModelWeight, Mapping[str, Any]]]:
        for group, parameters in zip(self._groups, self._parameters, strict=True):
            if group.base.tensor.numel():
                yield model_weight(group, parameters), parameters
