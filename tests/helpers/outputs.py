"""Output directories as a merge may find them, how it publishes into them, and what they hold after an interrupted merge."""

import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
from faults import contents, is_leftover
from transformers import AutoModelForCausalLM

from mergekit_mediator import MediatorModel
from mergekit_mediator.errors import ArtifactError
from mergekit_mediator.store.manifest import read_manifest
from mergekit_mediator.store.staging import Staging
from mergekit_mediator.store.verification import verify_files

TIME = 1_500_000_000
MINE = {
    "notes.txt": b"mine",
    "picture.png": b"\x89PNG",
    ".gitattributes": b"*.safetensors filter=lfs\n",
    ".git/HEAD": b"ref: refs/heads/main\n",
    "LICENSE": b"mine",
    "mediator/notes.txt": b"mine",
    "runs/1/model.safetensors": b"mine",
    "eval.json": b"{}",
    "model.gguf": b"GGUF",
}
KINDS = ("new", "empty", "mine", "artifact", "plain", "link")
WAYS = ("exchange", "in place", "inside")
# Inside what is the working directory; there is no inside of what is not there.
CASES = [(way, kind) for way in WAYS for kind in KINDS if (way, kind) != ("inside", "new")]


def add_mine(out):
    """Put files of a user into a directory."""
    for name, content in MINE.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
        os.utime(out / name, (TIME, TIME))
    (out / "link").symlink_to("notes.txt")
    (out / "empty").mkdir()


def is_mine(out):
    """Whether all files of the user are there, and as they were."""
    files = [out / name for name in MINE]
    return (
        all(p.is_file() and p.read_bytes() == c for p, c in zip(files, MINE.values(), strict=True))
        and all(path.stat().st_mtime == TIME for path in files)
        and os.readlink(out / "link") == "notes.txt"
        and (out / "empty").is_dir()
    )


def model_of(out):
    """The files of a directory but the user's."""
    return {name: c for name, c in contents(out).items() if name not in MINE and name != "link"}


class Output:
    """An output directory of one kind, which can be made again and again.

    Attributes:
        path: of the output.
        has_mine: whether files of a user are there.
    """

    def __init__(self, root, kind, artifact, plain):
        self.path, self.has_mine = root / "out", kind not in ("new", "empty")
        self._real, self._saved = root / "work" / "out", root / "saved"
        if kind != "link":
            self.path = self._real
        self._real.parent.mkdir(parents=True)
        if kind == "artifact":
            shutil.copytree(artifact, self._saved)
        elif kind == "plain":
            shutil.copytree(plain, self._saved, ignore=shutil.ignore_patterns("README.md"))
            shutil.copy(
                plain / "model.safetensors", self._saved / "model-00001-of-00002.safetensors"
            )
        elif kind != "new":
            self._saved.mkdir()
        if self.has_mine:
            add_mine(self._saved)
        if kind == "link":
            self.path.symlink_to(self._real)
        self.restore()
        self._before = model_of(self.path)

    def restore(self):
        """Give the output back what it held first. A directory that is there stays the same one."""
        for path in self._real.iterdir() if self._real.is_dir() else ():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if self._saved.exists():
            shutil.copytree(self._saved, self._real, symlinks=True, dirs_exist_ok=True)
        elif self._real.exists():
            self._real.rmdir()

    def state(self, new):
        """`old` or `new`, if the output holds what it did or all of `new`; `neither` if none can be loaded."""
        assert not self.has_mine or is_mine(self.path)
        now = model_of(self.path)
        if now == self._before:
            return "old"
        if now == model_of(new):
            verify_files(self.path, read_manifest(self.path))
            return "new"
        refuse_to_load(self.path)
        return "neither"

    def leftovers(self):
        """Staging directories and locks inside the output and beside it."""
        beside = [path.name for path in self._real.parent.iterdir()]
        inside = [path.relative_to(self._real).as_posix() for path in self._real.rglob("*")]
        return list(filter(is_leftover, beside + inside))


def refuse_to_load(out):
    """Check that no loader makes a model of a directory."""
    assert not (out / "config.json").exists()
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(
        ArtifactError, match=r"interrupted while it moved|missing, but the manifest"
    ):
        MediatorModel.from_pretrained(out)


def publish(source, out, overwrite=True):
    """Publish a copy of an artifact."""
    with Staging(Path(out), overwrite) as staging:
        shutil.copytree(source, staging.path, dirs_exist_ok=True, copy_function=os.link)
        staging.publish(read_manifest(source))


def by(way, output):
    """Publish in one way within this context."""
    if way == "inside":
        return mock.patch.object(Path, "cwd", return_value=output.path.resolve())
    return mock.patch(
        "mergekit_mediator.store.durable.can_exchange", return_value=way == "exchange"
    )
