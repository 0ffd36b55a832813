import os
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from mergekit_mediator import MediatorModel
from mergekit_mediator.engines.adapter_store import AdapterStore
from mergekit_mediator.errors import ExportError
from mergekit_mediator.serve.mixture import DENSE, Mixture

IDS = torch.arange(4, 24)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def mixture(store, **weights):
    return Mixture.of(weights, store.names)


def test_a_mixture_is_written_once_as_what_is_served(artifact, tmp_path):
    store = AdapterStore(artifact, 16, tmp_path)
    served = MediatorModel.from_pretrained(artifact)
    for weights in ({}, {"math": 1.0}, {"code": 0.25, "chat": 0.75}):
        folder = store.path(mixture(store, **weights))
        plain = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32)
        adapted = PeftModel.from_pretrained(plain, folder)
        with served.mixture(weights) as mixed:
            torch.testing.assert_close(logits(adapted), logits(mixed), rtol=1e-3, atol=1e-4)
        before = (folder / "adapter_model.safetensors").stat().st_mtime_ns
        assert AdapterStore(artifact, 16, tmp_path).path(mixture(store, **weights)) == folder
        assert (folder / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_servers_that_share_a_cache_write_an_adapter_once(artifact, tmp_path):
    stores = [AdapterStore(artifact, 16, tmp_path) for _ in range(8)]
    blend = mixture(stores[0], math=0.5, code=0.5)
    with ThreadPoolExecutor(8) as threads:
        folders = set(threads.map(lambda store: store.path(blend), stores))
    assert len(folders) == 1
    names = {path.name for path in stores[0].folder.iterdir()}
    assert names == {".lock", "math", "code", "math=0.5,code=0.5"}


def test_blends_used_longest_ago_leave_the_disk_and_experts_stay(artifact, tmp_path):
    store = AdapterStore(artifact, 16, tmp_path, most_blends=2)
    for age, eighths in enumerate((1, 2, 3)):
        folder = store.path(mixture(store, math=eighths / 8, code=1 - eighths / 8))
        os.utime(folder, (1000 + age, 1000 + age))
    assert store.has(mixture(store, math=0.25, code=0.75))  # now it is the one used last
    store.path(mixture(store, math=0.5, code=0.5))
    names = {path.name for path in store.folder.iterdir() if "lock" not in path.name}
    assert names == {"math", "code", "math=0.25,code=0.75", "math=0.5,code=0.5"}


def test_no_server_sees_a_blend_of_which_half_is_deleted(artifact, tmp_path, monkeypatch):
    store = AdapterStore(artifact, 16, tmp_path, most_blends=1)
    old = store.path(mixture(store, math=0.5, code=0.5))
    os.utime(old, (1000, 1000))
    delete, seen = shutil.rmtree, []

    def recorded(folder, **options):
        seen.append(old.is_dir())
        delete(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", recorded)
    store.path(mixture(store, math=0.25, code=0.75))
    assert seen[-1] is False
    assert {path.name for path in store.folder.iterdir()} == {
        ".lock",
        "math",
        "code",
        "math=0.25,code=0.75",
    }


def test_what_a_killed_server_left_is_deleted(artifact, tmp_path):
    store = AdapterStore(artifact, 16, tmp_path)
    (store.folder / ".partial-abc/adapter").mkdir(parents=True)
    store.path(DENSE)
    assert {path.name for path in store.folder.iterdir()} == {".lock", "dense"}


def test_what_a_small_rank_leaves_out_is_said(artifact, tmp_path):
    whole, small = AdapterStore(artifact, 16, tmp_path), AdapterStore(artifact, 4, tmp_path)
    for store in (whole, small):
        store.path(mixture(store, math=1.0))
    assert whole.lost("math") == ""
    lost = small.lost("math")
    assert lost.startswith("rank 4 leaves out")
    assert "of its squared change, and is predicted to keep " in lost
    assert whole.folder != small.folder


def test_what_a_rank_leaves_out_of_random_signs_is_called_noise(family, merged, tmp_path):
    signs = merged(family.config(values="random_sign", density=0.3, reference="base"))
    store = AdapterStore(signs, 4, tmp_path)
    store.path(mixture(store, math=1.0))
    lost = store.lost("math")
    assert "of its squared change, most of it noise of its random signs" in lost
    assert "predicted" not in lost


def test_a_cache_that_cannot_be_written_is_named(artifact, tmp_path):
    (tmp_path / "file").write_text("")
    store = AdapterStore(artifact, 16, tmp_path / "file")
    with pytest.raises(ExportError, match=r"file/.*/dense: the adapter cannot be written"):
        store.path(DENSE)


def test_a_disk_that_fills_is_said_and_nothing_of_the_adapter_stays(artifact, tmp_path):
    store = AdapterStore(artifact, 16, tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(
            ExportError, match=r"/math: the adapter cannot be written: .* I/O error"
        ):
            store.path(mixture(store, math=1.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in store.folder.iterdir()] == [".lock"]
    assert store.path(mixture(store, math=1.0)).is_dir()
