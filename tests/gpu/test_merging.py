"""A merge whose arithmetic is on the device: what it writes, beside what the processor writes."""

import adapters
import pico
import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_mediator import MediatorModel
from mergekit_mediator.merge.run import run
from mergekit_mediator.store.manifest import read_manifest
from mergekit_mediator.store.verification import verify_files

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# By method: what is stored to rounding, as it is decomposed or fitted.
ROUNDED = {
    "keep": {"keep": 0.97},
    "budget": {"budget": "2x"},
    "bits": {"bits": 3, "route": "all"},
    "rank": {"rank": 6, "route": "all"},
}


def wide():
    """A model whose matrices have many components."""
    return pico.llama(hidden_size=64, head_dim=32, intermediate_size=96, num_hidden_layers=2)


@pytest.fixture
def merge(tmp_path):
    def on(device, config, name):
        options = MergeOptions(quiet=True, device=str(device), lora_merge_cache=str(tmp_path / "l"))
        run(MergeConfiguration.model_validate(config), str(tmp_path / name), options)
        verify_files(tmp_path / name, read_manifest(tmp_path / name))
        return tmp_path / name

    return on


def files(out):
    """The bytes of all files by name, but for those that the time of a merge may be in."""
    found = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*.*")}
    return {n: b for n, b in found.items() if n.endswith(".safetensors")}


def models(out):
    """The dense expert and the experts; the response router is computed by decompositions."""
    return {n: b for n, b in files(out).items() if "router" not in n and "response" not in n}


def changes(out, base):
    """The change from the base to each expert as it is served, and to the dense expert, on the processor."""
    model, found = MediatorModel.from_pretrained(out), {}
    for name in (*model.experts, "dense"):
        with model.mixture(name) as mixed:
            weights = mixed.state_dict()
            found[name] = torch.cat([(weights[n].double() - base[n]).flatten() for n in base])
    return found


def doubles(weights):
    return {name: weight.double() for name, weight in weights.items()}


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        *((dtype, {}) for dtype in DTYPES),
        (torch.bfloat16, {"density": 0.2, "route": "all"}),
        (torch.float32, {"density": 1.0, "denoise": 0.3}),
    ],
    ids=str,
)
def test_exact_experts_are_the_same_bytes(device, make, merge, dtype, settings):
    family = make(dtype=dtype, experts=("math", "code"))  # halves are exact in any order of sums
    there, here = (
        merge(where, family.config(**settings), name)
        for where, name in ((device, "there"), ("cpu", "here"))
    )
    assert models(there) == models(here)
    layers = [[layer.routed for layer in read_manifest(out).layers] for out in (there, here)]
    assert layers[0] == layers[1]


@pytest.mark.parametrize("values", ["int4", "sign"])
def test_quantised_experts_are_the_same_to_rounding(device, make, merge, read, values):
    family = make(dtype=torch.bfloat16)
    config = family.config(route="all", density=0.3, values=values)
    base = doubles(read(family.base))
    found, expected = (
        changes(merge(where, config, name), base)
        for where, name in ((device, "there"), ("cpu", "here"))
    )
    for name, change in expected.items():
        assert float((found[name] - change).norm()) <= 1e-2 * float(change.norm())


@pytest.mark.parametrize("settings", ROUNDED.values(), ids=ROUNDED)
def test_decomposed_experts_come_as_near_as_those_of_the_processor(
    device, make, merge, read, settings
):
    family = make(wide, dtype=torch.bfloat16)
    config = family.config(**settings)
    base = doubles(read(family.base))
    here = changes(merge("cpu", config, "here"), base)
    there = changes(merge(device, config, "there"), base)
    assert float((there["dense"] - here["dense"]).norm()) <= 1e-3 * float(here["dense"].norm())
    for name, path in family.experts.items():
        weights = doubles(read(path))
        exact = torch.cat([(weights[n] - base[n]).flatten() for n in base])
        lost_there, lost_here = (float((c[name] - exact).norm()) for c in (there, here))
        assert lost_there <= 1.05 * lost_here + 1e-6


@pytest.mark.parametrize("settings", [{}, *ROUNDED.values()], ids=["auto", *ROUNDED])
def test_a_second_merge_writes_the_same_bytes(device, make, merge, tf32, settings):
    config = make(wide, dtype=torch.bfloat16).config(**settings)
    tf32(False)
    first = files(merge(device, config, "first"))
    tf32(True)  # the second one may use TF32, and must not
    assert files(merge(device, config, "second")) == first


@pytest.mark.parametrize("settings", [{}, ROUNDED["bits"]], ids=["auto", "bits"])
def test_workers_side_by_side_write_the_same_bytes(device, make, merge, settings):
    config = make(wide, dtype=torch.bfloat16).config(**settings)
    alone, threads = files(merge(device, config, "alone")), torch.get_num_threads()
    torch.set_num_threads(4)  # as many workers
    try:
        assert files(merge(device, config, "together")) == alone
    finally:
        torch.set_num_threads(threads)


def test_adapters_keep_their_own_factors(device, make, merge, tmp_path):
    family = make(wide, experts=(), dtype=torch.float32)
    entries = []
    for seed, name in enumerate(("math", "code")):
        adapters.train(family.base, tmp_path / name, seed, r=4)
        path = f"{family.base}+{tmp_path / name}"
        entries.append({"model": path, "parameters": {"expert": name}})
    config = {"merge_method": "mediator", "base_model": str(family.base), "models": entries}
    there, here = (
        models(merge(where, config, name)) for where, name in ((device, "there"), ("cpu", "here"))
    )
    experts = [name for name in here if "experts/" in name]
    assert len(experts) == 2
    assert all(there[name] == here[name] for name in experts)


@pytest.mark.parametrize("settings", [{}, ROUNDED["bits"]], ids=["auto", "bits"])
def test_the_stock_command_merges_on_the_device(device, make, merge, merged, settings):
    config = make(wide).config(**settings)
    option = "--cuda" if device.type == "cuda" else "--no-cuda"
    out = merged(config, option, name="stock")
    verify_files(out, read_manifest(out))
    assert files(out) == files(merge(device, config, "own"))


@pytest.mark.parametrize("method", ["mediator_dense", "tsvm", "iso_c"])
def test_methods_without_experts_merge_on_the_device(device, make, merged, read, method):
    config = make(wide, dtype=torch.float32).config(method)
    option = "--cuda" if device.type == "cuda" else "--no-cuda"
    there, here = (read(merged(config, o, name=n)) for o, n in ((option, "a"), ("--no-cuda", "b")))
    for name, weight in here.items():
        torch.testing.assert_close(there[name], weight, rtol=1e-3, atol=1e-3, msg=name)
