"""The one architecture of all models of a merge."""

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
    """Find mergekit's definition of the architecture; read the models' configurations, but no weights.

    Args:
        base: the base model.
        experts: the fine-tunes of the base.
        options: the options of the merge; they say whether the models' own code may run.

    Raises:
        InputError: a model cannot be found, its architecture or its tied weights differ from the base's,
            or mergekit does not know the architecture.
    """
    models = (base, *experts)
    configs = {model: _config(model, model == base, options) for model in models}
    base_config = configs[base]
    for model, config in configs.items():
        if config.architectures != base_config.architectures:
            raise InputError(
                f"model {model}: its architecture is {_names(config)}, but the base {base} is "
                f"{_names(base_config)}: experts must be fine-tunes of the base"
            )
        if is_tied(config) != is_tied(base_config):
            raise InputError(
                f"model {model}: tie_word_embeddings is {is_tied(config)}, but "
                f"{is_tied(base_config)} in the base: tie the embeddings of all models, or of none"
            )
    try:
        architecture = arch_info_for_config(base_config)
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
            f"{key} {model}: its configuration cannot be read: {first_line(error)}: name a model "
            "directory, or a model on the Hub"
        ) from error
    return config


def _names(config: transformers.PretrainedConfig) -> str:
    return ", ".join(config.architectures or ["unknown"])
