"""Contexts that end properly wherever an interrupt falls; `contextlib.contextmanager` does not promise that.

Python raises KeyboardInterrupt between any two instructions of the main thread. One may be the first
instruction of a function that cleans up, before the `try` of that function. So no cleanup here depends on one
call alone.
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
    """Do as `contextlib.contextmanager`, for generators that do not see the error that ends the context.

    The generator is closed at the end of the context. If an interrupt prevents that, Python closes the generator
    because no reference to it is left.
    """

    @wraps(function)
    def scoped(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[T]:
        return cast(AbstractContextManager[T], _Scope(function(*args, **kwargs)))

    return scoped


@scope
def undoing(undo: Callable[[], None]) -> Generator[None, None, None]:
    """Call a function at the end of the context, and again if an interrupt stopped it.

    Args:
        undo: the function. It must also work when all or half of its work is done already.

    Raises:
        KeyboardInterrupt: an interrupt stopped the function, which has run to its end since.
    """
    try:
        try:
            yield
        finally:
            _to_the_end(undo)
    finally:  # an interrupt may stop the first call before its first instruction
        _to_the_end(undo)


def _to_the_end(undo: Callable[[], None]) -> None:
    """Call a function until no interrupt stops it, then raise the last interrupt."""
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

    The traceback of an interrupt keeps all frames of Python, and with them the objects that they refer to. So
    `with` gets a method that runs without a frame that refers to the generator. The class itself has an ordinary
    function, as `contextlib.ExitStack` calls that.
    """

    def __init__(
        self, bind: Callable[["_Scope"], Callable[..., Any]], plain: Callable[..., Any]
    ) -> None:
        self._bind, self._plain = bind, plain

    def __get__(self, scope: "_Scope | None", owner: type) -> Callable[..., Any]:
        return self._plain if scope is None else self._bind(scope)


def _exit(scope: "_Scope") -> Callable[..., None]:
    """Make an `__exit__` that alone keeps the generator: `with` drops both when the context has ended."""
    leave = partial(_leave, ref(scope.generator))
    leave.generator = scope.generator  # type: ignore[attr-defined]
    return leave


def _leave(generator: Callable[[], Any], *_error: object) -> None:
    generator().close()


class _Scope:
    """The context of a generator that yields once."""

    def __init__(self, generator: Generator[Any, None, None]) -> None:
        self.generator = generator

    __enter__ = _Special(lambda self: self.generator.__next__, lambda self: next(self.generator))
    __exit__ = _Special(_exit, lambda self, *_error: self.generator.close())
