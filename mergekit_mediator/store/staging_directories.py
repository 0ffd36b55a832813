"""The names of staging directories, and the search for those of an output."""

import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

_NAME = re.compile(r"(?:\.(.+))?\.partial-[0-9a-f]+")


def new_staging_directory(out: Path, inside: bool) -> Path:
    """Choose a path for a staging directory, inside an output or beside it; no directory is made."""
    name = f".partial-{secrets.token_hex(4)}"
    return out / name if inside else out.with_name(f".{out.name}{name}")


def staging_directories(out: Path) -> Iterator[Path]:
    """Yield the staging directories of an output.

    Args:
        out: the output, a path without links.
    """
    for folder, name in {out.parent: out.name, out: None}.items():
        if folder.is_dir() and os.access(folder, os.R_OK):
            for path in sorted(folder.iterdir()):
                staged = _NAME.fullmatch(path.name)
                if staged and staged[1] == name and _is_ours(path, out):
                    yield path


def output_name(path: Path) -> str:
    """Read the name of an output from its path, or from the path of its staging directory."""
    staged = _NAME.fullmatch(path.name)
    return path.name if staged is None else staged[1] or path.parent.name


def _is_ours(path: Path, out: Path) -> bool:
    """Whether a path is a directory of this user or of the output's owner.

    A directory of another user must not make this process move files.
    """
    if path.is_symlink() or not path.is_dir():
        return False
    owners = [os.geteuid()] if hasattr(os, "geteuid") else []
    owners += [out.stat().st_uid] if out.exists() else []
    return path.stat().st_uid in owners
