"""Forward hooks that are removed at every exit, even where an interrupt falls."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mergekit_mediator.models.scope import scope, undoing


@dataclass(frozen=True, eq=False)
class Hook:
    """A function that a module calls in its forward pass.

    The object exists before the hook is installed; torch's own handle exists only afterwards. So an interrupt
    between the two cannot lose it.

    Attributes:
        module: the module that calls the function.
        function: the hook. No other hook of the module is the same object.
        before: True to call it before the forward pass, False to call it after the pass.
        reset: undoes the changes that the hook made to the module; None if it makes none.
    """

    module: nn.Module
    function: Callable[..., Any]
    before: bool = False
    reset: Callable[[], None] | None = None

    def install(self) -> None:
        """Register the hook with its module."""
        if self.before:
            self.module.register_forward_pre_hook(self.function)
        else:
            self.module.register_forward_hook(self.function)

    def remove(self) -> None:
        """Remove the hook from its module, if it is there, and reset the module."""
        hooks = self.module._forward_pre_hooks if self.before else self.module._forward_hooks
        for key in [key for key, function in hooks.items() if function is self.function]:
            hooks.pop(key, None)
        if self.reset is not None:
            self.reset()


@scope
def hooked(hooks: Sequence[Hook]) -> Generator[None, None, None]:
    """Install hooks for the duration of a context."""

    def remove() -> None:
        for hook in hooks:
            hook.remove()

    with undoing(remove):
        for hook in hooks:
            hook.install()
        yield
