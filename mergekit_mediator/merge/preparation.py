"""A configuration, checked, with the models that it names: where `plan` and `merge` both begin."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_mediator.merge.budget import check_budget
from mergekit_mediator.merge.conflict import Conflict
from mergekit_mediator.merge.estimate import dense_sizes
from mergekit_mediator.merge.inputs import Inputs
from mergekit_mediator.merge.layers import LayerPlan, plan_layers
from mergekit_mediator.merge.planner import PlannedWeight
from mergekit_mediator.merge.tuning import Prompts, read_all_prompts
from mergekit_mediator.merge.unknown_keys import check_keys

Models = TypeVar("Models", bound=Inputs)


@dataclass(frozen=True)
class Preparation(Generic[Models]):
    """Everything that is known of a merge before a weight is read.

    Attributes:
        inputs: the models.
        weights: all of them, in the model's order.
        prompts: by expert, of those that are tuned.
    """

    inputs: Models
    weights: Sequence[PlannedWeight]
    prompts: Prompts

    def plan_layers(self, conflicts: Mapping[str, Conflict]) -> list[LayerPlan]:
        """The layers of the merge, decided as far as that is possible.

        Args:
            conflicts: by weight; empty before any is measured.
        """
        config = self.inputs.config
        places = [(weight.layer, weight.info.name) for weight in self.weights]
        return plan_layers(places, config.selection, config.conflict, conflicts)


@contextmanager
def prepared(
    kind: type[Models],
    merge_config: MergeConfiguration,
    options: MergeOptions,
    config_source: str | None = None,
    output: AbstractContextManager[Any] | None = None,
) -> Iterator[Preparation[Models]]:
    """Check a configuration and read the headers of its models; they are open inside the context.

    Args:
        kind: `HeaderInputs`, or `OpenInputs` where weights are to be read.
        merge_config: with `merge_method: mediator`.
        options: mergekit's own.
        config_source: the configuration's text, if there is one: its unknown keys are refused.
        output: where the merge goes; it is entered once the configuration is checked, and before any model is
            opened.

    Raises:
        ConfigError: the configuration cannot be carried out.
        InputError: a model cannot be read, or does not fit the others.
    """
    if config_source is not None:
        check_keys(config_source, merge_config)
    with ExitStack() as stack:
        if options.lora_merge_cache is None:
            merged_adapters = stack.enter_context(tempfile.TemporaryDirectory())
            options = options.model_copy(update={"lora_merge_cache": merged_adapters})
        inputs = kind(merge_config, options)
        prompts = read_all_prompts(inputs.config)
        if output is not None:
            stack.enter_context(output)
        stack.enter_context(inputs)
        weights = inputs.weights()
        check_budget(inputs.config, dense_sizes(inputs, weights))
        yield Preparation(inputs, weights, prompts)
