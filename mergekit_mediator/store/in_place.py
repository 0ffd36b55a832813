"""Publishing file by file, into a directory that cannot be exchanged for another.

The old model moves aside, then the new one moves in. The configuration, which every loader reads first, is the
first file to leave and the last to arrive. So the directory holds no model in between. A journal in the staging
directory lists both, and after a crash the next merge puts the old model back.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from mergekit_mediator.errors import OutputError
from mergekit_mediator.store import durable

_JOURNAL = ".publishing.json"
_ASIDE = ".replaced"
_ENTRANCES = ("config.json", "adapter_config.json", "params.json")


class _Moves(NamedTuple):
    """The files of the new model that move in, and those of the old one that move aside, both in order."""

    new: list[str]
    old: list[str]


def publish_in_place(staged: Path, out: Path, new: Sequence[str], old: Sequence[str]) -> None:
    """Replace the model in an output directory by the one in a staging directory.

    Args:
        staged: the staging directory.
        out: the output directory.
        new: paths inside the staging directory of the files to move in.
        old: paths inside the output of the files to move aside.

    Raises:
        OSError: a step failed; `roll_back` puts the old model back.
    """
    new, old = _entrances_last(new), _entrances_last(old)
    durable.write_text(staged / _JOURNAL, json.dumps(_Moves(new, old)._asdict()))
    for name in reversed(old):
        _move(out / name, staged / _ASIDE / name)
    _remove_empty(out, old)
    for name in new:
        if name == new[-1]:
            _sync_folders(out, new)
        _move(staged / name, out / name)
    durable.sync(out)


def is_half_published(staged: Path) -> bool:
    """Tell whether a staging directory still has files of a model that belong into the output."""
    moves = _read_journal(staged)
    return moves is not None and (staged / moves.new[-1]).exists()


def roll_back(staged: Path, out: Path) -> None:
    """Put the old model back, unless all files of the new one have arrived.

    Raises:
        OutputError: the journal is damaged.
        OSError: a step failed.
    """
    moves = _read_journal(staged)
    if moves is None or not is_half_published(staged):
        return
    new, old = moves
    aside = [name for name in old if os.path.lexists(staged / _ASIDE / name)]
    untouched = set(old).difference(aside)
    for name in new:
        if untouched.isdisjoint((name, *(p.as_posix() for p in Path(name).parents))):
            (out / name).unlink(missing_ok=True)
    _remove_empty(out, new)
    for name in aside:
        _move(staged / _ASIDE / name, out / name)
    _sync_folders(out, old)
    (staged / _JOURNAL).unlink()


def _read_journal(staged: Path) -> _Moves | None:
    path = staged / _JOURNAL
    try:
        moves = _Moves(**json.loads(path.read_text(encoding="utf-8")))
        paths = [Path(name) for name in (*moves.new, *moves.old)]
        if not moves.new or any(path.is_absolute() or ".." in path.parts for path in paths):
            raise ValueError("it is empty, or a path leads out of the directory")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(
            f"{path}: a list of moved files required, to undo an interrupted merge: {error}: move the "
            f"files that you need out of {staged}, then remove it"
        ) from error
    return moves


def _entrances_last(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (name in _ENTRANCES, name))


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)


def _folders(root: Path, names: Iterable[str]) -> list[Path]:
    """The folders of files, from the deepest to the root."""
    inside = {folder for name in names for folder in Path(name).parents}
    return [root / folder for folder in sorted(inside, key=lambda f: -len(f.parts))]


def _remove_empty(root: Path, names: Iterable[str]) -> None:
    for folder in _folders(root, names):
        if folder == root or folder.is_symlink() or not folder.is_dir():
            continue
        if not any(folder.iterdir()):
            folder.rmdir()


def _sync_folders(root: Path, names: Iterable[str]) -> None:
    for folder in _folders(root, names):
        if folder.is_dir():
            durable.sync(folder)
