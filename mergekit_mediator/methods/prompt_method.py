"""The base class of methods that need the models' answers to prompts, measured before the merge."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from mergekit.merge_methods.base import (
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from torch import Tensor

from mergekit_mediator.errors import ConfigError
from mergekit_mediator.methods.task_vector_method import TaskVectorMethod, task_vector_spec
from mergekit_mediator.methods.whole_model import FIGURES

PROMPTS = ParameterSpec("prompts", str | int, ParameterScope.NON_BASE, default="")


class Figures(Protocol):
    """The figures of every weight, which lie on disk until the weight is merged."""

    def of(self, weight: str) -> Tensor:
        """Read the figures of one weight by its name, float32; each method says which and in what shape."""
        ...


class PromptMethod(TaskVectorMethod):
    """A method with figures of every weight. `combine` finds a `Figures` as `parameters["figures"]`.

    Attributes:
        reads: how often all models are read, with the merge itself; about.
        memory: bytes in memory for each parameter of a model, while figures are measured.
        disk: bytes on disk for each parameter, from the measurement to the end of the merge.
        disk_each: the same for each parameter of each expert.
    """

    reads: ClassVar[int]
    memory: ClassVar[int]
    disk: ClassVar[int] = 0
    disk_each: ClassVar[int] = 0

    @classmethod
    def times_read(cls, parameters: Mapping[str, Any]) -> int:
        """Count how often all models are read with these top-level parameters."""
        return cls.reads

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Merge one weight; see `TaskVectorMethod`.

        Raises:
            ConfigError: nobody measured the figures.
        """
        if FIGURES not in parameters:
            raise ConfigError(
                f"merge_method {self.spec.name}: models on disk required, as they answer prompts, but this merge is "
                "in memory or weight by weight: use mergekit-yaml"
            )
        return super().merge_group(group, **parameters)


def figures_of(parameters: Mapping[str, Any], weight: str, like: Tensor) -> Tensor:
    """Read the figures of one weight on the device of a tensor."""
    figures: Figures = parameters[FIGURES]
    return figures.of(weight).to(like.device)


def prompt_spec(
    name: str, pretty_name: str, paper: str, *parameters: ParameterSpec
) -> MergeMethodSpec:
    """The description of a method that takes `prompts` per model; see `task_vector_spec`."""
    return task_vector_spec(name, pretty_name, paper, PROMPTS, *parameters)
