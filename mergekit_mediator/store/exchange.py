"""Publishing into a directory that exists: the staging directory takes its place in one step.

Before the step, the staging directory gets a second name (a hard link) of each file of the user. So those files
are never absent, and never copied.
"""

import errno
import os
import shutil
from collections.abc import Container
from pathlib import Path

from mergekit_mediator.store import durable

# Errors of file systems that exchange no directories, or give files no second name.
_IMPOSSIBLE = {
    *(errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV),
    *(errno.EBUSY, errno.EPERM, errno.EACCES, errno.EMLINK),
}


def exchange_with(staged: Path, out: Path, model: Container[str]) -> bool:
    """Exchange a staging directory with the output.

    Args:
        staged: the staging directory, beside the output.
        out: the output.
        model: paths of the model's files inside the output, which are not carried over.

    Returns:
        Whether the exchange took place. If not, the system cannot do it here, and the output is unchanged.

    Raises:
        OSError: a step failed, and the output is unchanged.
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
    """Give each file of a directory a second name in another one, except the files of a model.

    A file of that name in the other directory stays.

    Args:
        source: the directory that has the files.
        target: the directory that gets the names.
        model: paths of the model's files inside the source.
        folder: the folder inside both directories to begin with.

    Raises:
        OSError: a step failed; `EXDEV` if the folder is on another file system.
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
    target_status = os.stat(target / folder)
    if (target_status.st_uid, target_status.st_gid) != (status.st_uid, status.st_gid):
        os.chown(target / folder, status.st_uid, status.st_gid)
    shutil.copystat(source / folder, target / folder)
    durable.sync(target / folder)


def _carry_folder(source: Path, target: Path, model: Container[str], folder: Path) -> None:
    is_new = not os.path.lexists(target / folder)
    if is_new:
        os.mkdir(target / folder)
    carry_over(source, target, model, folder)
    if is_new and any((source / folder).iterdir()) and not any((target / folder).iterdir()):
        os.rmdir(target / folder)  # the source's folder has files of the model only
