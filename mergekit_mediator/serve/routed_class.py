"""Make a transformers model route its own calls, so that every tool that uses the model is routed too."""

from functools import lru_cache, wraps
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from mergekit_mediator.errors import MixtureError


class Mediator(Protocol):
    """The object that answers the calls of a routed model."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Answer `model(...)`."""
        ...

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Answer `model.generate(...)`."""
        ...


def route_calls(model: PreTrainedModel, mediator: Mediator) -> type[PreTrainedModel]:
    """Send `model(...)` and `model.generate(...)` to the mediator from now on.

    The model's class becomes a subclass with the same name, so that saved models and code that looks at the
    class see the stock architecture.

    Returns:
        The stock class.
    """
    stock = type(model)
    # The artifact's remote code sets `generate` on the instance, which would hide the class's method.
    vars(model).pop("generate", None)
    model.__class__ = _routed(stock)  # type: ignore[arg-type]
    model.mediator = mediator  # type: ignore[assignment]
    return stock


@lru_cache
def _routed(stock: Any) -> type[PreTrainedModel]:
    class Routed(stock):  # type: ignore[misc]
        # Routing depends on values, so torch.compile must leave these calls as they are.
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        @wraps(stock.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.mediator.forward(*args, **kwargs)

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        @wraps(stock.generate)
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            return self.mediator.generate(*args, **kwargs)

        def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
            raise MixtureError(_CONTINUOUS)

        def __reduce_ex__(self, protocol: Any) -> Any:
            raise MixtureError(_COPY)

        def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
            raise MixtureError(_CONTINUOUS)

    Routed.__name__, Routed.__qualname__ = stock.__name__, stock.__qualname__
    Routed.__module__ = stock.__module__
    return Routed


_COPY = (
    "a routed model cannot be copied or pickled: load the artifact again, or save the dense expert "
    "with save_pretrained"
)
_CONTINUOUS = (
    "continuous batching bypasses generate and cannot be routed: use generate, or load the dense "
    "expert without remote code"
)
