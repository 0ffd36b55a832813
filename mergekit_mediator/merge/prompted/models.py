"""The models of a merge that answer prompts: one of them at a time is in memory, in float32."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mergekit.common import ImmutableMap, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import GatherTensors, LoaderCache
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from torch import Tensor
from tqdm import tqdm

from mergekit_mediator.errors import ConfigError, InputError
from mergekit_mediator.merge.lessons import Prompts, prepare_lessons, read_prompts_of
from mergekit_mediator.merge.parameters import prompts_of_experts, sources
from mergekit_mediator.models.loading import load_plain
from mergekit_mediator.models.locate import locate_weights
from mergekit_mediator.tune.teacher import Answered


def read_prompts_of_all(config: MergeConfiguration, method: str) -> Prompts:
    """Read the prompts of every expert, before any weight is read.

    Args:
        config: of the merge.
        method: that needs them, for error messages.

    Raises:
        ConfigError: an expert has no prompts, they stand in the wrong place, or a file cannot be read.
    """
    files = prompts_of_experts(config)
    for model, _ in sources(config):
        if model != config.base_model and not files.get(model):
            raise ConfigError(
                f"model {model}: prompts: a file of prompts required by {method}, got none: add "
                "`prompts: FILE.jsonl` to its parameters, or the number of texts that it shall write itself"
            )
    if config.base_model in files:
        raise ConfigError(
            f"model {config.base_model}: the base model answers no prompts: remove `prompts`"
        )
    return {model: read_prompts_of(model, file) for model, file in files.items()}


class PromptedModels:
    """The models of a merge, of which one at a time is in memory.

    Attributes:
        base: the base model.
        experts: in the order of the merge.
    """

    def __init__(
        self, tasks: Sequence[ExecuteMergeMethodTask], options: MergeOptions, prompts: Prompts
    ) -> None:
        """Check that the models can answer. No weight is read.

        Args:
            tasks: that merge each weight.
            options: mergekit's options.
            prompts: of every expert.

        Raises:
            ConfigError: the merge changes layers or vocabulary, or the prompts cannot be answered.
        """
        self._tasks = {task.output_weight.name: task for task in tasks}
        self._options, self.base = options, tasks[0].base_model
        self.experts = tuple(model for model in tasks[0].model_order if model != self.base)
        for name, task in self._tasks.items():
            gather = task.gather_tensors
            if not isinstance(gather, GatherTensors):
                raise ConfigError(
                    f"{name}: one vocabulary required, as all models answer prompts: leave out `tokenizer` and "
                    "--allow-crimes"
                )
            if any(info.name != name for info in gather.weight_info.values()):
                raise ConfigError(
                    f"{name}: whole models required, as all models answer prompts: leave out `slices`"
                )
        self._root = Path(LoaderCache().get(self.base).index.base_path)
        self._lessons = prepare_lessons(prompts, self._root, options.trust_remote_code)

    @cached_property
    def model(self) -> Any:
        """The model in memory; at first the base model.

        Raises:
            ArtifactError: transformers cannot load the base model.
        """
        model: Any = load_plain(self._root, "float32", self._options.trust_remote_code)
        model.requires_grad_(False)
        return model.to(self._options.device or "cpu")

    @cached_property
    def places(self) -> dict[str, Tensor]:
        """By name, the tensor of the model in memory that holds a weight; buffers of integers are left out."""
        shapes = {}
        for name in self._tasks:
            base = self.load(name, self.base)
            if base.is_floating_point():
                shapes[name] = tuple(base.shape)
        return locate_weights(self.model, shapes, shapes)

    def load(self, name: str, model: ModelReference) -> Tensor:
        """Load a weight of one model, as the merge itself loads it.

        Raises:
            InputError: the model lacks the weight.
        """
        gather = self._tasks[name].gather_tensors
        info = ImmutableMap(data={model: gather.weight_info[model]})
        (task,) = gather.model_copy(update={"weight_info": info}).arguments().values()
        tensor: Tensor | None = task.execute()
        if tensor is None:
            raise InputError(f"{name}: missing from {model}, but not from the other models")
        return tensor

    def parameter(self, name: str, parameter: str) -> Any:
        """Give a parameter of the merge of one weight; one that each expert has is given by expert."""
        task = self._tasks[name]
        if parameter in task.parameters:
            return task.parameters[parameter]
        return {expert: task.input_parameters[expert][parameter] for expert in self.experts}

    def become(self, model: ModelReference) -> None:
        """Fill the model in memory with the weights of one model of the merge.

        Raises:
            InputError: the model lacks a weight, or has it in another shape than the base.
        """
        for name, place in self.places.items():
            weight = self.load(name, model)
            if weight.shape != place.shape:
                raise InputError(
                    f"{name}: shape {list(weight.shape)} in {model}, but {list(place.shape)} in the base: "
                    "experts must be fine-tunes of the base"
                )
            place.copy_(weight)
        LoaderCache().flush_all()  # mapped files stay in memory as far as they were read

    def answers(self, expert: ModelReference) -> list[Answered]:
        """Let an expert answer its prompts, or write texts. It is the model in memory afterwards."""
        self.become(expert)
        lesson = self._lessons[expert]
        with self.bar(f"answers of {expert}", lesson.count) as bar:
            return lesson.answered(self.model, bar.update)

    def bar(self, description: str, total: int) -> "tqdm[Any]":
        """Make a progress bar, which is hidden with --quiet."""
        return tqdm(total=total, desc=description, disable=self._options.quiet)
