"""Faults at every step that a process takes on a file system: it is killed there, or the step fails."""

import errno
import functools
import gc
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from unittest import mock

_STEPS = ("replace", "rename", "link", "symlink", "unlink", "remove", "rmdir", "mkdir")
_STEPS += ("fsync", "chmod", "chown", "utime", "truncate", "write")
ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EROFS": errno.EROFS}


class Steps:
    """Counts steps, and lets one of them, or all from one on, end badly.

    Args:
        at: the step, counted from 1; 0 for none.
        fault: `kill`, `interrupt`, or an error of `ERRORS`.
        lasting: whether later steps fail too.
    """

    def __init__(self, at: int = 0, fault: str = "kill", lasting: bool = False) -> None:
        self.taken, self._at, self._fault, self._lasting = 0, at, fault, lasting

    def take(self, *arguments: object) -> None:
        self.taken += 1
        if not self._at or self.taken < self._at or (self.taken > self._at and not self._lasting):
            return
        if self._fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._fault == "interrupt":
            raise KeyboardInterrupt
        code = ERRORS[self._fault]
        path = [str(argument) for argument in arguments[:1] if not isinstance(argument, int)]
        raise OSError(code, os.strerror(code), *path)


@contextmanager
def faults(at: int = 0, fault: str = "kill", lasting: bool = False) -> Iterator[Steps]:
    """Count the steps that write, and let one fail.

    Garbage of earlier code waits until the end: a temporary directory that is collected removes its files.
    """
    steps = Steps(at, fault, lasting)

    def counted(function: Callable, writes: Callable[..., bool] = lambda *_, **__: True):
        @functools.wraps(function)
        def call(*arguments, **options):
            if writes(*arguments, **options):
                steps.take(*arguments)
            return function(*arguments, **options)

        return call

    def by_flags(path, flags, *_, **__):
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

    def by_mode(path, mode="r", *_, **__):
        return any(letter in mode for letter in "wax+")

    opened = counted(io.open, by_mode)
    patches = [
        mock.patch.multiple(os, **{name: counted(getattr(os, name)) for name in _STEPS}),
        mock.patch("os.open", counted(os.open, by_flags)),
        mock.patch("io.open", opened),
        mock.patch("builtins.open", opened),
    ]
    with suppress(ImportError, AttributeError):
        import mergekit_mediator.store.durable as durable

        patches.append(mock.patch.object(durable, "exchange", counted(durable.exchange)))
    with _garbage_waits(), ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield steps


@contextmanager
def _garbage_waits() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def in_child(action: Callable[[], object], seconds: int = 120) -> int:
    """Run in a process of its own; gives its status, negative for the signal that ended it."""
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        try:
            action()
        except KeyboardInterrupt:
            os._exit(130)
        except BaseException as error:  # noqa: BLE001 a child reports, it does not go on
            with suppress(OSError):
                os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def contents(root: Path) -> dict[str, tuple[object, ...]]:
    """What a directory holds by path: the content of files, and what links say; not what is staged there."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if is_leftover(name):
            continue
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_file():
            found[name] = ("file", path.read_bytes())
    return found


def is_leftover(name: str) -> bool:
    """Whether a path is a staging directory's or a lock's."""
    return any(".partial-" in part or part.endswith("mediator-lock") for part in name.split("/"))


def leftovers(out: Path) -> list[str]:
    """Staging directories and locks inside a directory and beside it."""
    beside = [path.name for path in out.parent.iterdir() if is_leftover(path.name)]
    inside = [p.relative_to(out).as_posix() for p in out.rglob("*")] if out.is_dir() else []
    return beside + list(filter(is_leftover, inside))
