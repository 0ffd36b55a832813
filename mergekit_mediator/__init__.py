"""Merge fine-tunes of one base model into one checkpoint plus small experts, and route each request."""

__version__ = "0.1.0"

# The start-up hook imports this file in every interpreter, so the file does not import `typing`.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from mergekit_mediator.errors import MediatorError as MediatorError
    from mergekit_mediator.route.decision import RoutingDecision as RoutingDecision
    from mergekit_mediator.serve.model import MediatorModel as MediatorModel
    from mergekit_mediator.store.manifest import Manifest as Manifest

_EXPORTS = {
    "Manifest": "store.manifest",
    "MediatorError": "errors",
    "MediatorModel": "serve.model",
    "RoutingDecision": "route.decision",
}

__all__ = ["Manifest", "MediatorError", "MediatorModel", "RoutingDecision", "__version__"]


def __getattr__(name: str) -> object:
    """Import an exported name on its first use, so that importing the package does not import torch."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
