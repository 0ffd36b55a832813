"""One process at a time writes to an output; the others are told who does, and a process that died is in nobody's way."""

import errno
import fcntl
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from faults import in_child
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_mediator.errors import OutputError
from mergekit_mediator.merge.run import run
from mergekit_mediator.store.manifest import read_manifest
from mergekit_mediator.store.output_lock import output_lock
from mergekit_mediator.store.staging import Staging
from mergekit_mediator.store.verification import verify_files

BUSY = r"process \d+ on \S+, since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\S*, writes there: wait until it"


def merge(family, out, **options):
    config = MergeConfiguration.model_validate(family.config(route="all", density=0.5))
    return run(config, str(out), MergeOptions(quiet=True), **options)


@pytest.mark.parametrize("there", [False, True])
def test_the_second_of_two_is_refused_at_once_and_told_who_writes(tmp_path, there):
    out = tmp_path / "out"
    if there:
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(out)
    with Staging(out) as staging:
        for path in (out, tmp_path / "." / "out", tmp_path / "link"):
            begun = time.monotonic()
            with pytest.raises(OutputError, match=f"^{re.escape(str(path))}: {BUSY}") as caught:
                Staging(path, overwrite=True).__enter__()
            assert time.monotonic() - begun < 1
            assert "\n" not in str(caught.value)
            assert f"process {os.getpid()} on" in str(caught.value)
        assert staging.path.is_dir()
    with Staging(out):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == (["link", "out"] if there else ["link"])


def test_two_merges_into_one_new_directory_give_one_model_and_one_refusal(family, tmp_path):
    out, errors, both = tmp_path / "out", [], threading.Barrier(2)

    def one():
        both.wait()
        try:
            merge(family, out)
        except OutputError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 1
    # which of the three depends on the moment: the lock is taken before its holder is named in it
    named, unnamed = BUSY, "another process writes there: wait until it"
    assert re.search(f"{named}|{unnamed}|: holds a model", errors[0])
    verify_files(out, read_manifest(out))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_process_that_was_killed_is_in_nobodys_way_though_its_number_comes_again(
    family, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    monkeypatch.setattr(os, "getpid", lambda: 7)

    def killed():
        with Staging(out) as staging:
            (staging.path / "half").write_text("half")
            signal.raise_signal(signal.SIGKILL)

    for _ in range(3):
        assert in_child(killed) == -9
        assert {path.name for path in tmp_path.iterdir()} > {".out.mediator-lock"}
    merge(family, out)
    verify_files(out, read_manifest(out))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_that_goes_away_while_it_is_waited_for_is_taken_anew(tmp_path, monkeypatch):
    """Else the second process holds a file that is gone, and a third one the new file of that name."""
    stock, removed = fcntl.flock, []

    def flock(descriptor, operation):
        if not removed:
            removed.append((tmp_path / ".out.mediator-lock").unlink())
        stock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with output_lock(tmp_path / "out"):
        assert (tmp_path / ".out.mediator-lock").exists()
        with pytest.raises(OutputError, match=BUSY), output_lock(tmp_path / "out"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_who_writes_inside_only_keeps_out_those_who_can_write_beside(tmp_path, monkeypatch):
    """As another user does, or a container that sees nothing but the output."""
    out = tmp_path / "out"
    out.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: Path(path) == out)
        lock = output_lock(out)
        assert lock.__enter__() == out
    with pytest.raises(OutputError, match=BUSY), output_lock(out):
        pass
    lock.__exit__(None, None, None)
    with output_lock(out) as place:
        assert place == tmp_path
    assert list(out.iterdir()) == []


def test_a_file_system_without_locks_is_warned_about(tmp_path, monkeypatch, capsys):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with output_lock(tmp_path / "out"):
        pass
    assert f"warning: {tmp_path}: its file system has no locks" in capsys.readouterr().out


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".out.mediator-lock").symlink_to(tmp_path / "notes.txt")
    with (
        pytest.raises(OutputError, match="out: cannot be written in"),
        output_lock(tmp_path / "out"),
    ):
        pass
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_another_output_in_the_same_directory_is_free(tmp_path):
    with (
        Staging(tmp_path / "out"),
        Staging(tmp_path / "out2"),
        Staging(tmp_path / "out.partial-0a"),
    ):
        assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 3
    assert list(tmp_path.iterdir()) == []
