"""The lock of an output directory: one process holds it at a time, and loses it when it ends."""

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

from mergekit_mediator.errors import OutputError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

INSIDE = ".mediator-lock"
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def output_lock(out: Path) -> Iterator[Path]:
    """Hold the lock of an output directory, which need not exist.

    The lock is a hidden file beside the directory. It is inside the directory if the parent is not writable,
    or if the directory is a mount point, which others may see under another path. The file is removed
    at the end. The operating system releases the lock when its process ends, however it ends.

    Args:
        out: the output directory, or a link to it.

    Yields:
        The directory of the lock file: the output's parent, or the output.

    Raises:
        OutputError: another process holds the lock, or the lock file cannot be written.
    """
    place = out.resolve()
    beside, inside = place.parent / f".{place.name}.mediator-lock", place / INSIDE
    with ExitStack() as stack:
        try:
            first = inside if os.path.ismount(place) else beside
            try:
                stack.enter_context(_locked(first, out))
            except OSError as error:
                if first == inside or not place.is_dir() or error.errno not in _READ_ONLY:
                    raise
                first = inside
                stack.enter_context(_locked(first, out))
            if first == beside and inside.exists():  # its process cannot write beside the output
                stack.enter_context(_locked(inside, out))
        except OSError as error:
            raise OutputError(
                f"{out}: cannot be written in {first.parent}: {error.strerror}: choose another "
                "output directory"
            ) from error
        yield first.parent


@contextmanager
def _locked(path: Path, out: Path) -> Iterator[None]:
    """Hold one lock file, and remove it at the end."""
    while True:
        # A link is not followed: another user may have put it there to make this process overwrite its target.
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(path, flags, 0o666)
        try:
            _lock(descriptor, path, out)
            if _is_at(descriptor, path):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has just removed it
    try:
        _sign(descriptor)
        yield
    finally:
        # The file is removed while this process holds it, so that no other process locks a removed file.
        # Windows removes no open file.
        try:
            if os.name != "nt":
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
        if os.name == "nt":
            path.unlink(missing_ok=True)


def _lock(descriptor: int, path: Path, out: Path) -> None:
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # beyond the text, which stays readable
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            tqdm.write(
                f"warning: {path.parent}: its file system has no locks: run one merge at a time"
            )
        elif error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            raise OutputError(
                f"{out}: {_holder(path)} writes there: wait until it ends, or choose another "
                "output directory"
            ) from error
        else:
            raise


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Write the holder of the lock into its file, for the error of other processes."""
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    text = f"process {os.getpid()} on {socket.gethostname()}, since {since},"
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.truncate(descriptor, 0)
    os.write(descriptor, text.encode())


def _holder(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # the holder has just ended
        text = ""
    return " ".join(text.split())[:200] or "another process"
