"""Staging directories: how they are called, and which belong to an output."""

import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

_NAME = re.compile(r"(?:\.(.+))?\.partial-[0-9a-f]+")


def new_staging_directory(out: Path, inside: bool) -> Path:
    """A path for a staging directory, inside an output or beside it; nothing is made."""
    name = f".partial-{secrets.token_hex(4)}"
    return out / name if inside else out.with_name(f".{out.name}{name}")


def staging_directories(out: Path) -> Iterator[Path]:
    """The staging directories that are there for an output, a path without links."""
    for folder, name in {out.parent: out.name, out: None}.items():
        if folder.is_dir() and os.access(folder, os.R_OK):
            for path in sorted(folder.iterdir()):
                staged = _NAME.fullmatch(path.name)
                if staged and staged[1] == name and _is_ours(path, out):
                    yield path


def output_name(path: Path) -> str:
    """The name of the output that a directory is, or is staged for."""
    staged = _NAME.fullmatch(path.name)
    return path.name if staged is None else staged[1] or path.parent.name


def _is_ours(path: Path, out: Path) -> bool:
    """Whether a path is a directory of this user or the output's: what others put there moves no files."""
    if path.is_symlink() or not path.is_dir():
        return False
    owners = [os.geteuid()] if hasattr(os, "geteuid") else []
    owners += [out.stat().st_uid] if out.exists() else []
    return path.stat().st_uid in owners
