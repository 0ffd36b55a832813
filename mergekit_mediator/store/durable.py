"""Steps on a file system that outlive a crash or a power cut: each is flushed to disk and takes effect at once."""

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_WINDOWS = os.name == "nt"


def sync(path: Path) -> None:
    """Flush a file or a directory to disk."""
    is_directory = path.is_dir()
    # Windows opens no directories, and flushes only files that are open for writing.
    if is_directory and _WINDOWS:
        return
    descriptor = os.open(path, os.O_RDWR if _WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems flush no directories.
        if not is_directory or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    """Flush a directory with everything below it to disk."""
    for folder, _, files in os.walk(root, topdown=False):
        for name in files:
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink():
                sync(path)
        sync(Path(folder))


def replace(written: Path, path: Path) -> None:
    """Move a complete file into its place, at once and for good.

    Args:
        written: the file, beside its place.
        path: the place, where a file may be.
    """
    sync(written)
    os.replace(written, path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a text file at once and for good; after an error the old file is there."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file at once and for good; after an error the old file is there."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def exchange(first: Path, second: Path) -> None:
    """Exchange two directories of one file system, in one step.

    Raises:
        OSError: the file system refuses; `ENOSYS` if the operating system has no such step.
    """
    rename = _renameat2()
    if rename is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(second))
    one, two = os.fsencode(first), os.fsencode(second)
    if rename(_AT_FDCWD, one, _AT_FDCWD, two, _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(second))


def can_exchange() -> bool:
    """Tell whether the operating system has a step for `exchange`; its file systems may still refuse it."""
    return _renameat2() is not None


def _renameat2() -> Callable[..., int] | None:
    """The function of Linux, for which Python has no name."""
    if not sys.platform.startswith("linux"):
        return None
    function: Callable[..., int] | None = getattr(
        ctypes.CDLL(None, use_errno=True), "renameat2", None
    )
    return function


def remove_tree(root: Path) -> None:
    """Remove a directory with everything below it, even if its rights forbid changes."""
    root.chmod(0o700)
    for folder, names, _ in os.walk(root):
        for path in (Path(folder, name) for name in names):
            if not path.is_symlink():
                path.chmod(0o700)
    shutil.rmtree(root)
