"""The right to write to an output directory: one process has it at a time, and loses it when it ends."""

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
    """Hold an output directory, which need not be there yet.

    The lock is a hidden file beside the directory; inside, where nothing can be written beside it, or
    where it is a file system of its own, which others may see under another path. The file is removed
    in the end. The operating system gives the lock back when its process ends, however that ends.

    Yields:
        The directory that holds the lock: the output's parent, or the output.

    Raises:
        OutputError: another process holds it, or no lock can be written.
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
            if first == beside and inside.exists():  # of someone who cannot write beside it
                stack.enter_context(_locked(inside, out))
        except OSError as error:
            raise OutputError(
                f"{out}: cannot be written in {first.parent}: {error.strerror}: choose another "
                "output directory"
            ) from error
        yield first.parent


@contextmanager
def _locked(path: Path, out: Path) -> Iterator[None]:
    """Hold one lock file, and remove it."""
    while True:
        # no link is followed: others may write there too, and the file is written to
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(path, flags, 0o666)
        try:
            _lock(descriptor, path, out)
            if _is_at(descriptor, path):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it just now
    try:
        _sign(descriptor)
        yield
    finally:
        # It is removed while it is held, so that nobody holds a file that is gone. Windows removes no
        # file that is open, nor one that another process has opened.
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
    """Whether a file is still the one of its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Write who holds the lock, for those who meet it."""
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    text = f"process {os.getpid()} on {socket.gethostname()}, since {since},"
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.truncate(descriptor, 0)
    os.write(descriptor, text.encode())


def _holder(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # it has just ended
        text = ""
    return " ".join(text.split())[:200] or "another process"
