"""The architecture that all models of a merge have in common."""

from collections.abc import Sequence

import transformers
from mergekit.architecture import ModelArchitecture, arch_info_for_config
from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_mediator.errors import InputError, first_line
from mergekit_mediator.merge.planner import is_tied


def common_architecture(
    base: ModelReference, experts: Sequence[ModelReference], options: MergeOptions
) -> ModelArchitecture:
    """mergekit's definition of the architecture; reads model configurations, no weights.

    Args:
        base: the base model.
        experts: its fine-tunes.
        options: of the merge; say whether code of the models may be run.

    Raises:
        InputError: a model cannot be found, has another architecture than the base or ties other weights,
            or mergekit knows no such architecture.
    """
    models = (base, *experts)
    configs = {model: _config(model, model == base, options) for model in models}
    of_base = configs[base]
    for model, config in configs.items():
        if config.architectures != of_base.architectures:
            raise InputError(
                f"model {model}: architecture {_names(config)}, but the base {base} is "
                f"{_names(of_base)}: experts must be fine-tunes of the base"
            )
        if is_tied(config) != is_tied(of_base):
            raise InputError(
                f"model {model}: tie_word_embeddings is {is_tied(config)}, but "
                f"{is_tied(of_base)} in the base: untie or tie all models alike"
            )
    try:
        architecture = arch_info_for_config(of_base)
        if architecture is None:
            from mergekit.architecture.auto import infer_architecture_info

            architecture = infer_architecture_info(models, base, options)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"model {base}: {first_line(error)}") from error
    return architecture


def _config(
    model: ModelReference, is_base: bool, options: MergeOptions
) -> transformers.PretrainedConfig:
    try:
        config: transformers.PretrainedConfig = model.config(
            trust_remote_code=options.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        key = "base_model" if is_base else "model"
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{key} {model}: needs code that comes with it, which runs only where you allow it: read its "
                ".py files, then give --trust-remote-code"
            ) from error
        raise InputError(
            f"{key} {model}: neither a model directory here nor one "
            f"that the Hub gives: {first_line(error)}"
        ) from error
    return config


def _names(config: transformers.PretrainedConfig) -> str:
    return ", ".join(config.architectures or ["unknown"])
