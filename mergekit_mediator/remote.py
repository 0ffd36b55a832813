"""What the remote code of an artifact calls; see `remote_code`."""

from typing import Any

from transformers import PreTrainedModel

from mergekit_mediator.serve.model import MediatorModel


class RoutedCausalLM:
    """Loads the routed model where AutoModelForCausalLM expects a class."""

    @classmethod
    def from_pretrained(cls, source: str, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """The transformers model of `MediatorModel.from_pretrained`; `.mediator` is the rest of it."""
        return MediatorModel.from_pretrained(source, **kwargs).model

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: the class of the model that is loaded is the stock one's."""


def generate(*args: Any, model: Any = None, verify: bool = True, **kwargs: Any) -> Any:
    """Routed generation for a model that was loaded from an artifact as its stock class.

    Args:
        args: as for transformers' generate; the model comes first, if it has no name.
        model: what transformers has loaded. It gives it by name, after whatever the user gives.
        verify: see `MediatorModel.attach`; files are checked at the first call only.
        kwargs: as for `MediatorModel.generate`.

    Raises:
        ArtifactError: see `MediatorModel.attach`.
    """
    if model is None:
        model, *args = args  # type: ignore[assignment]
    if getattr(model, "mediator", None) is None:
        # transformers puts this function there where it loads a model whose code the user trusts
        trusted = "generate" in vars(model)
        source = model.name_or_path
        MediatorModel.attach(model, source, verify=verify, trust_remote_code=trusted)
    return type(model).generate(model, *args, **kwargs)
