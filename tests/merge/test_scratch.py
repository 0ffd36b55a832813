import os
import tempfile

import pytest
import torch

from mergekit_mediator.merge.scratch import Scratch


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_tensors_come_back_and_their_directory_goes_with_the_last(folder):
    scratch = Scratch()
    for name in "ab":
        scratch[name] = torch.full((2,), float(ord(name)))
    assert {name: tensor.tolist() for name, tensor in scratch.items()} == {
        "a": [97, 97],
        "b": [98, 98],
    }
    del scratch["a"], scratch["b"]
    assert list(folder.iterdir()) == []
    scratch["c"] = torch.ones(1)
    del scratch
    assert list(folder.iterdir()) == []


def test_what_a_killed_process_left_behind_goes_and_what_is_in_use_stays(folder):
    left = folder / "mergekit-mediator-killed"
    left.mkdir()
    (left / "0.safetensors").write_bytes(b"tensor")
    lock = left / ".tensors.mediator-lock"
    lock.write_text("process 1")
    mine = folder / "mergekit-mediator-results"
    mine.mkdir()
    used = Scratch()
    used["a"] = torch.ones(1)
    assert left.exists()  # it may have been made just now
    (lock_in_use,) = {*folder.glob("*/.tensors.*")} - {lock}
    for path in (lock, lock_in_use):
        os.utime(path, (1000, 1000))
    other = Scratch()
    other["a"] = torch.zeros(1)
    assert not left.exists()
    assert mine.exists()
    assert used["a"].tolist() == [1]
