"""Contexts that are left wherever an interrupt falls, which `contextlib.contextmanager` does not promise.

Python raises KeyboardInterrupt between two instructions of the main thread: also on the first one of a
function that was called to clean up, before any `try` of it. So nothing here hangs on one function.
"""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar, cast
from weakref import ref

P = ParamSpec("P")
T = TypeVar("T")


def scope(
    function: Callable[P, Generator[T, None, None]],
) -> Callable[P, AbstractContextManager[T]]:
    """As `contextlib.contextmanager`, for generators that do not look at what ends the context.

    The generator is closed at the end of the context. Where an interrupt prevents that, it is closed
    because nobody refers to it any more.
    """

    @wraps(function)
    def scoped(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[T]:
        return cast(AbstractContextManager[T], _Scope(function(*args, **kwargs)))

    return scoped


@scope
def undoing(undo: Callable[[], None]) -> Generator[None, None, None]:
    """Calls a function at the end of the context, and again where an interrupt has ended it.

    Args:
        undo: may be called when there is nothing to undo any more, and when half of it is undone.
    """
    try:
        try:
            yield
        finally:
            _to_the_end(undo)
    finally:  # an interrupt may end the first before its first instruction
        _to_the_end(undo)


def _to_the_end(undo: Callable[[], None]) -> None:
    """Call a function until it has not been interrupted; the interrupt is raised then."""
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            undo()
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


class _Special:
    """A method that `with` looks up when it begins.

    For `with`, it is made so that no frame of Python refers to the generator: such a frame stays in the
    traceback of an interrupt, and the generator with it. On the class it is an ordinary function, which
    is what `contextlib.ExitStack` calls.
    """

    def __init__(
        self, made: Callable[["_Scope"], Callable[..., Any]], plain: Callable[..., Any]
    ) -> None:
        self._made, self._plain = made, plain

    def __get__(self, scope: "_Scope | None", owner: type) -> Callable[..., Any]:
        return self._plain if scope is None else self._made(scope)


def _leaving(scope: "_Scope") -> Callable[..., None]:
    """What `with` alone refers to, and drops when it has ended: the generator goes with it."""
    leave = partial(_leave, ref(scope.generator))
    leave.generator = scope.generator  # type: ignore[attr-defined]
    return leave


def _leave(generator: Callable[[], Any], *_error: object) -> None:
    generator().close()


class _Scope:
    """The context of a generator that yields once."""

    def __init__(self, generator: Generator[Any, None, None]) -> None:
        self.generator = generator

    __enter__ = _Special(lambda own: own.generator.__next__, lambda own: next(own.generator))
    __exit__ = _Special(_leaving, lambda own, *_error: own.generator.close())
