"""What the remote code of an artifact calls; see `remote_code`."""

from typing import Any

from transformers import PreTrainedModel

from mergekit_mediator.runtime import MediatorModel


class RoutedCausalLM:
    """Loads the routed model where AutoModelForCausalLM expects a class."""

    @classmethod
    def from_pretrained(cls, source: str, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """The transformers model of `MediatorModel.from_pretrained`; `.mediator` is the rest of it."""
        kwargs.pop("trust_remote_code", None)
        return MediatorModel.from_pretrained(source, **kwargs).model

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: the class of the model that is loaded is the stock one's."""


def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Routed generation for a model that was loaded from an artifact as its stock class."""
    if getattr(model, "mediator", None) is None:
        MediatorModel.attach(model, model.name_or_path)
    return type(model).generate(model, *args, **kwargs)
