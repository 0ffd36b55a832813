"""Publishing into a directory that is there: the staging directory takes its place in one step.

The user's files are in both directories meanwhile, each under a second name of the same file: so they are
never absent, and never copied.
"""

import errno
import os
import shutil
from collections.abc import Container
from pathlib import Path

from mergekit_mediator.store import durable

# What says that directories cannot be exchanged here, or that a file can have no second name.
_IMPOSSIBLE = {
    *(errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV),
    *(errno.EBUSY, errno.EPERM, errno.EACCES, errno.EMLINK),
}


def exchange_with(staged: Path, out: Path, model: Container[str]) -> bool:
    """Let a staging directory and the output change places.

    Args:
        staged: the staging directory, beside the output.
        out: the output.
        model: paths of the files in the output that are not carried over.

    Returns:
        Whether they did. If not, the system cannot do it here, and the output is as it was.

    Raises:
        OSError: a step failed, and the output is as it was.
    """
    if not durable.can_exchange():
        return False
    try:
        carry_over(out, staged, model)
        durable.exchange(staged, out)
    except OSError as error:
        if error.errno in _IMPOSSIBLE:
            return False
        raise
    return True


def carry_over(source: Path, target: Path, model: Container[str], folder: Path = Path()) -> None:
    """Give the files of a directory a second name in another one, except those of a model.

    Files that the other directory has by then stay as they are.
    """
    status = os.stat(source / folder)
    if status.st_dev != os.stat(source).st_dev:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source / folder))
    for entry in list(os.scandir(source / folder)):
        name, place = folder / entry.name, target / folder / entry.name
        if name.as_posix() in model:
            continue
        if entry.is_dir(follow_symlinks=False):
            _carry_folder(source, target, model, name)
        elif not os.path.lexists(place):
            os.link(entry.path, place, follow_symlinks=False)
    there = os.stat(target / folder)
    if (there.st_uid, there.st_gid) != (status.st_uid, status.st_gid):
        os.chown(target / folder, status.st_uid, status.st_gid)
    shutil.copystat(source / folder, target / folder)
    durable.sync(target / folder)


def _carry_folder(source: Path, target: Path, model: Container[str], folder: Path) -> None:
    made = not os.path.lexists(target / folder)
    if made:
        os.mkdir(target / folder)
    carry_over(source, target, model, folder)
    if made and any((source / folder).iterdir()) and not any((target / folder).iterdir()):
        os.rmdir(target / folder)  # there were files of the model only
