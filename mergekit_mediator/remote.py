"""The names that the remote code of every artifact imports; see `remote_code`."""

from typing import Any

from transformers import PreTrainedModel

from mergekit_mediator.serve.model import MediatorModel


class RoutedCausalLM:
    """The class that AutoModelForCausalLM finds in the remote code; it loads the routed model."""

    @classmethod
    def from_pretrained(cls, source: str, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """Load the routed model of an artifact.

        Args:
            source: the artifact: a directory, or a repository's name on the Hub.
            args: ignored.
            kwargs: as for `MediatorModel.from_pretrained`.

        Returns:
            The transformers model. Its attribute `mediator` is the `MediatorModel`.

        Raises:
            ArtifactError: see `MediatorModel.from_pretrained`.
        """
        return MediatorModel.from_pretrained(source, **kwargs).model

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: the loaded model has the stock class, which needs no registration."""


def generate(*args: Any, model: Any = None, verify: bool = True, **kwargs: Any) -> Any:
    """Route and generate, for a model that transformers loaded from an artifact as the stock class.

    Args:
        args: as for transformers' `generate`. The first is the model, if `model` is None.
        model: the model. transformers passes it by name, after the user's arguments.
        verify: see `MediatorModel.attach`. Only the first call checks the files.
        kwargs: as for `MediatorModel.generate`.

    Returns:
        The result of `MediatorModel.generate`.

    Raises:
        ArtifactError: see `MediatorModel.attach`.
    """
    if model is None:
        model, *args = args  # type: ignore[assignment]
    if getattr(model, "mediator", None) is None:
        # transformers sets this function as `model.generate` only if the user trusts the artifact's code
        trusted = "generate" in vars(model)
        source = model.name_or_path
        MediatorModel.attach(model, source, verify=verify, trust_remote_code=trusted)
    return type(model).generate(model, *args, **kwargs)
