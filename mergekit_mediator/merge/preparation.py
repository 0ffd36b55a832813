"""The preparation of a merge: its checked configuration and its models. `plan` and `merge` begin here."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_mediator.errors import ConfigError
from mergekit_mediator.merge.conflict import Conflict
from mergekit_mediator.merge.estimate import dense_sizes
from mergekit_mediator.merge.experts.budget import check_budget
from mergekit_mediator.merge.inputs import Inputs
from mergekit_mediator.merge.layers import LayerPlan, plan_layers
from mergekit_mediator.merge.lessons import Prompts, read_all_prompts
from mergekit_mediator.merge.planner import PlannedWeight
from mergekit_mediator.merge.unknown_keys import check_keys

Models = TypeVar("Models", bound=Inputs)


@dataclass(frozen=True)
class Preparation(Generic[Models]):
    """The state of a merge before it reads a weight.

    Attributes:
        inputs: the models, entered.
        weights: all weights in the model's order.
        prompts: the prompts of each expert that is tuned.
    """

    inputs: Models
    weights: Sequence[PlannedWeight]
    prompts: Prompts

    def plan_layers(self, conflicts: Mapping[str, Conflict]) -> list[LayerPlan]:
        """Plan the layers of the merge, see `layers.plan_layers`.

        Args:
            conflicts: the conflict of each weight by name; empty before conflict is measured.
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
    """Check a configuration and read the headers of its models, which are open inside the context.

    Args:
        kind: `HeaderInputs`, or `OpenInputs` to read weights.
        merge_config: a configuration with `merge_method: mediator`.
        options: mergekit's options.
        config_source: the text of the configuration; None skips the check for unknown keys.
        output: the output of the merge. It is entered after the check of the configuration and before any
            model is opened.

    Yields:
        The preparation.

    Raises:
        ConfigError: a merge by this configuration is not possible.
        InputError: a model cannot be read, or differs from the base in architecture or shapes.
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
        check_rank(inputs, weights)
        yield Preparation(inputs, weights, prompts)


def check_rank(inputs: Inputs, weights: Sequence[PlannedWeight]) -> None:
    """Refuse a `rank` that a matrix does not have, by the headers.

    Raises:
        ConfigError: the rank is above the smaller side of a matrix.
    """
    rank = inputs.config.rank
    if rank is None:
        return
    for weight in weights:
        header = inputs.header(weight, inputs.base)
        if header is not None and len(header.shape) == 2 and rank > min(header.shape):
            raise ConfigError(
                f"parameters: rank: at most {min(header.shape)} required, the smaller side of "
                f"{weight.info.name} {list(header.shape)}, got {rank}: lower it"
            )
