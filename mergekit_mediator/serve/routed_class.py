"""Makes a transformers model route its own calls, so that every tool that uses it is routed too."""

from functools import lru_cache, wraps
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from mergekit_mediator.errors import MixtureError


class Mediator(Protocol):
    """What a routed model asks."""

    def forward(self, *args: Any, **kwargs: Any) -> Any: ...

    def generate(self, *args: Any, **kwargs: Any) -> Any: ...


def route_calls(model: PreTrainedModel, mediator: Mediator) -> type[PreTrainedModel]:
    """From here on `model(...)` and `model.generate(...)` are the mediator's; gives the stock class.

    The model's class becomes a subclass of its own with the same name, so that what is saved from it,
    and what looks at its class, sees the stock architecture.
    """
    stock = type(model)
    vars(model).pop(
        "generate", None
    )  # that of the artifact's remote code, which would hide the class's
    model.__class__ = _routed(stock)  # type: ignore[arg-type]
    model.mediator = mediator  # type: ignore[assignment]
    return stock


@lru_cache
def _routed(stock: Any) -> type[PreTrainedModel]:
    class Routed(stock):  # type: ignore[misc]
        # routing is no graph: torch.compile leaves these calls as they are
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
    "a routed model cannot be copied or pickled: load the artifact again, or save_pretrained the "
    "dense expert"
)
_CONTINUOUS = (
    "continuous batching bypasses generate and cannot be routed: use generate, or load the dense "
    "expert without remote code"
)
