"""Forward hooks that are taken away wherever an interrupt falls."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mergekit_mediator.models.scope import scope, undoing


@dataclass(frozen=True, eq=False)
class Hook:
    """A function that a module calls in its forward pass.

    It is known before it is in place, whereas torch's own handle is only known afterwards.

    Attributes:
        module: the one that calls it.
        function: the hook, an object of its own.
        before: whether it is called before the forward pass instead of after it.
        reset: undoes what the hook has done to the module.
    """

    module: nn.Module
    function: Callable[..., Any]
    before: bool = False
    reset: Callable[[], None] | None = None

    def install(self) -> None:
        """Put it in place."""
        if self.before:
            self.module.register_forward_pre_hook(self.function)
        else:
            self.module.register_forward_hook(self.function)

    def remove(self) -> None:
        """Take it away, as far as it is in place."""
        hooks = self.module._forward_pre_hooks if self.before else self.module._forward_hooks
        for key in [key for key, function in hooks.items() if function is self.function]:
            hooks.pop(key, None)
        if self.reset is not None:
            self.reset()


@scope
def hooked(hooks: Sequence[Hook]) -> Generator[None, None, None]:
    """Modules have their hooks inside the context."""

    def remove() -> None:
        for hook in hooks:
            hook.remove()

    with undoing(remove):
        for hook in hooks:
            hook.install()
        yield
