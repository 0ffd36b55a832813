"""A planner for this package's methods of task vectors: it checks parameters and measures figures."""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap
from mergekit.graph import Task
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.base import TensorEntry, TensorGroup, TensorMetadata
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.tokenizer import BuildTokenizer
from torch import Tensor
from tqdm import tqdm

from mergekit_mediator.errors import InputError
from mergekit_mediator.merge.headers import read_headers
from mergekit_mediator.merge.method_parameters import check_parameters
from mergekit_mediator.merge.planner import is_tied
from mergekit_mediator.merge.scratch import Scratch
from mergekit_mediator.methods.prompt_method import PromptMethod
from mergekit_mediator.methods.task_vector_method import (
    ModelWeight,
    TaskVectorMethod,
    UnreadWeight,
    model_weight,
)
from mergekit_mediator.methods.whole_model import FIGURES, WholeModelMethod


def checking_and_measuring(stock: Any) -> Any:
    """Let mergekit's planner check the parameters of a `TaskVectorMethod`, and measure where a method needs it.

    A `WholeModelMethod` measures the weights, a `PromptMethod` the models' answers.

    Args:
        stock: the class `MergePlanner`.
    """

    class Planner(stock):  # type: ignore[misc]
        _tensors: list[tuple[WeightInfo, ExecuteMergeMethodTask]]

        def _plan(self) -> None:
            method = self._method
            if not isinstance(method, TaskVectorMethod):
                super()._plan()
                return
            check_parameters(self.config, method.spec)
            if isinstance(method, PromptMethod):
                # imports mergekit.merge, and so not before the plugin is complete
                from mergekit_mediator.merge.prompted.figures import measure
                from mergekit_mediator.merge.prompted.models import (
                    PromptedModels,
                    read_prompts_of_all,
                )

                prompts = read_prompts_of_all(self.config, method.spec.name)
            super()._plan()
            if is_tied(self.out_model_config):  # the same weight as the one that it is tied to
                self._tensors = [(i, task) for i, task in self._tensors if not i.tied_names]
            method.check([_unread(info, task) for info, task in self._tensors])
            if isinstance(method, WholeModelMethod):
                weights = _OnDisk([t for _, t in self._tensors], self.options, method.spec.name)
                figures = method.measure(weights, _parameters(self._tensors[0][1]))
                self._tensors = [(i, _with_figures(task, figures)) for i, task in self._tensors]
            elif isinstance(method, PromptMethod):
                tasks = [task for _, task in self._tensors]
                models = PromptedModels(tasks, self.options, prompts)
                figures = measure(method.spec.name, models)
                self._tensors = [(i, _with_figures(task, figures)) for i, task in self._tensors]

    return Planner


def _parameters(task: ExecuteMergeMethodTask) -> dict[str, Any]:
    """The parameters of one weight by name; those that each expert has, such as `weight`, by expert."""
    experts = {m: of for m, of in task.input_parameters.items() if m != task.base_model}
    names = next(iter(experts.values()))
    return {
        **dict(task.parameters.items()),
        **{name: {m: of[name] for m, of in experts.items()} for name in names},
    }


def _unread(info: WeightInfo, task: ExecuteMergeMethodTask) -> UnreadWeight:
    """One weight with its parameters, and its shape where the base model has safetensors headers."""
    index = LoaderCache().get(task.base_model).index
    names = (info.name, *(info.aliases or ()), *(info.tied_names or ()))
    name = next((name for name in names if name in index.tensor_paths), None)
    shape = None
    if name is not None and index.is_safetensors:
        file = index.tensor_paths[name]
        shape = read_headers(Path(index.base_path), [file])[name].shape
    return UnreadWeight(info.name, shape, _parameters(task))


def _with_figures(task: ExecuteMergeMethodTask, figures: Any) -> ExecuteMergeMethodTask:
    parameters = ImmutableMap({**dict(task.parameters.items()), FIGURES: figures})
    return task.model_copy(update={"parameters": parameters})


class _OnDisk:
    """The weights of models on disk, loaded as the merge itself loads them, one at a time."""

    def __init__(self, tasks: Sequence[ExecuteMergeMethodTask], options: Any, method: str) -> None:
        self._tasks, self._options, self._method = tasks, options, method
        self._tokenizers: dict[Task[Any], Any] = {}
        self.scratch: MutableMapping[str, Tensor] | None = Scratch()

    def __iter__(self) -> Iterator[tuple[ModelWeight, Mapping[str, Any]]]:
        for task in tqdm(
            self._tasks, desc=f"measure for {self._method}", disable=self._options.quiet
        ):
            group = self._load(task)
            if group is not None:
                parameters = _parameters(task)
                weight = model_weight(group, parameters)
                del group  # the task vectors are all that is needed from here on
                yield weight, parameters
                del weight
        LoaderCache().flush_all()  # mapped files stay in memory as far as they were read

    def _load(self, task: ExecuteMergeMethodTask) -> TensorGroup | None:
        """The tensors of one weight; None of a buffer, or of no values.

        Raises:
            InputError: a model lacks the weight that others have.
        """
        tensors = self._run(task.gather_tensors)
        name = task.output_weight.name
        for model in task.model_order:
            if model not in tensors:
                raise InputError(
                    f"{name}: missing from {model}, but not from the others: {self._method} compares all "
                    "weights of all models"
                )
        if not all(t.is_floating_point() and t.numel() for t in tensors.values()):
            return None
        group = TensorGroup(
            entries=tuple(
                TensorEntry(
                    model, tensors[model].to(self._options.device), model == task.base_model
                )
                for model in task.model_order
            ),
            metadata=TensorMetadata.from_weight_info(task.output_weight),
        )
        group.validate_tensors()
        return group

    def _run(self, task: Task[Any]) -> Any:
        """The result of a task; a tokenizer is built once."""
        if task in self._tokenizers:
            return self._tokenizers[task]
        result = task.execute(**{name: self._run(t) for name, t in task.arguments().items()})
        if isinstance(task, BuildTokenizer):
            self._tokenizers[task] = result
        return result
