"""A prediction of what a merge by a method with prompts needs, from headers alone."""

from dataclasses import dataclass

from mergekit.config import InputModelDefinition, MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_mediator.errors import ConfigError
from mergekit_mediator.merge.estimate import dense_sizes, largest_activations, smallest_memory
from mergekit_mediator.merge.inputs import HeaderInputs
from mergekit_mediator.merge.lessons import count_of
from mergekit_mediator.merge.method_parameters import check_parameters
from mergekit_mediator.merge.preparation import prepared
from mergekit_mediator.merge.prompted.models import read_prompts_of_all
from mergekit_mediator.methods.mediator import METHOD as MEDIATOR
from mergekit_mediator.methods.with_prompts import WITH_PROMPTS

PROMPTED = {method.spec.name: method for method in WITH_PROMPTS}


@dataclass(frozen=True)
class PromptedPlan:
    """The needs of a merge, sizes in bytes.

    Attributes:
        method: its name.
        prompts: the number of prompts by expert.
        read: from the models, in all passes.
        dense: of the merged checkpoint.
        scratch: on disk in the temporary folder, until the merge ends.
        peak_memory: about. One model in float32 is in memory; activations of one prompt and its answer are included.
    """

    method: str
    prompts: dict[str, int]
    read: int
    dense: int
    scratch: int
    peak_memory: int


def plan_prompted(
    config: MergeConfiguration, options: MergeOptions, source: str | None = None
) -> PromptedPlan:
    """Check a configuration, read the headers of its models, and predict what the merge needs.

    Args:
        config: with a merge method of `PROMPTED`.
        options: mergekit's options.
        source: the text of the configuration; None skips the check for unknown keys.

    Raises:
        ConfigError: a merge by this configuration is not possible.
        InputError: a header cannot be read, or shapes differ.
    """
    method = PROMPTED[config.merge_method]
    check_parameters(config, method.spec)
    prompts = read_prompts_of_all(config, method.spec.name)
    if not config.models:
        raise ConfigError(
            "models: whole models required, as all answer prompts: leave out `slices`"
        )
    # the same models without parameters: what reads headers is made for `mediator`
    models = [InputModelDefinition(model=entry.model) for entry in config.models]
    plain = {"route": "none", "bits": 1.0}
    same = config.model_copy(
        update={"merge_method": MEDIATOR, "models": models, "parameters": plain}
    )
    with prepared(HeaderInputs, same, options, source) as preparation:
        inputs, weights = preparation.inputs, preparation.weights
        sizes = dense_sizes(inputs, weights).values()
        numbers = sum(size.numel for size in sizes)
        each = sum(inputs.input_bytes(weight) for weight in weights)
        memory = smallest_memory(inputs, weights) + method.memory * numbers
        memory += 4 * max((size.numel for size in sizes), default=0)
        memory += largest_activations(inputs, weights)
    return PromptedPlan(
        method=method.spec.name,
        prompts={str(model): count_of(of_model) for model, of_model in prompts.items()},
        read=method.times_read(config.parameters or {}) * each,
        dense=sum(size.bytes for size in sizes),
        scratch=(method.disk + method.disk_each * len(prompts)) * numbers,
        peak_memory=memory,
    )
