"""Threads and CUDA streams that ask one model for different experts at once."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Barrier

import pytest
import torch
from routed_pico import build
from weight_pairs import same_bits

from mergekit_mediator import MediatorModel

pytestmark = pytest.mark.gpu
NAMES = tuple(f"expert{i}" for i in range(8))
ROUNDS = 3
LONG = 100_000_000  # cycles of a device: much longer than all that a test does
NEAR = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def root(make, tmp_path_factory):
    out = tmp_path_factory.mktemp("streams") / "out"
    build(out, make(dtype=torch.float32, experts=NAMES), density=1.0)
    return out


@pytest.fixture(params=["device", "cpu", "disk"])
def model(root, device, request):
    model = MediatorModel.from_pretrained(root, residency=request.param)
    model.model.to(device)
    return model


@pytest.fixture
def ids(device):
    told = torch.randint(4, 60, (4, 12), generator=torch.Generator().manual_seed(3)).to(device)
    synchronize(device)
    return told


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def at_once(device, streams, ask):
    """The answers of a thread for each expert, which all ask at once, each on one of some streams."""
    barrier = Barrier(len(NAMES))
    made = [torch.cuda.Stream(device) for _ in range(streams)]

    def answers(place):
        barrier.wait()
        with torch.cuda.stream(made[place % streams]) if made else nullcontext():
            return [ask(NAMES[place]).cpu() for _ in range(ROUNDS)]

    with ThreadPoolExecutor(len(NAMES)) as pool:
        return list(pool.map(answers, range(len(NAMES))))


def check(device, model, ids, streams, apply):
    """Every thread gets the answers of its own expert, and the dense expert is as before."""
    before = {name: weight.clone() for name, weight in model.model.state_dict().items()}

    def ask(name):
        return model.forward(ids, mixture=name, apply=apply).logits

    alone = [ask(name).cpu() for name in NAMES]
    apart = min(float((a - b).abs().max()) for i, a in enumerate(alone) for b in alone[:i])
    assert apart > 100 * NEAR["atol"]
    synchronize(device)
    for expected, found in zip(alone, at_once(device, streams, ask), strict=True):
        for answer in found:
            torch.testing.assert_close(answer, expected, **NEAR)
    synchronize(device)
    after = model.model.state_dict()
    assert all(same_bits(before[name], after[name]) for name in before)


@pytest.mark.parametrize("apply", ["merge", "rows"])
def test_eight_threads_get_the_answers_of_their_own_experts(device, model, ids, apply):
    check(device, model, ids, 0, apply)


@pytest.mark.parametrize("apply", ["merge", "rows"])
def test_eight_threads_on_two_streams_mix_no_answers(cuda, model, ids, apply):
    check(cuda, model, ids, 2, apply)


def test_a_mixture_waits_for_that_of_another_stream(cuda, model):
    dense = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    last = model.manifest.routed_layers[-1].weights[-1]
    expected = {}
    for name in NAMES[:2]:
        with model.mixture(name) as mixed:
            expected[name] = mixed.state_dict()[last].clone()
    torch.cuda.synchronize(cuda)
    found = {}
    for name in NAMES[
        :2
    ]:  # one after the other here, and side by side on the device but for our care
        with torch.cuda.stream(torch.cuda.Stream(cuda)), model.mixture(name) as mixed:
            torch.cuda._sleep(LONG)
            found[name] = mixed.state_dict()[last].clone()
    torch.cuda.synchronize(cuda)
    assert all(same_bits(found[name], expected[name]) for name in found)
    assert not same_bits(*found.values())
    after = model.model.state_dict()
    assert all(same_bits(dense[name], after[name]) for name in dense)


@pytest.mark.parametrize("model", ["device"], indirect=True)
def test_routing_waits_for_the_mixture_of_another_stream(cuda, model, ids):
    expected = model.route(ids).weights.clone()
    torch.cuda.synchronize(cuda)
    with torch.cuda.stream(torch.cuda.Stream(cuda)), model.mixture(NAMES[0]):
        torch.cuda._sleep(LONG)
    with torch.cuda.stream(torch.cuda.Stream(cuda)):
        found = model.route(ids).weights.clone()
    torch.cuda.synchronize(cuda)
    torch.testing.assert_close(found, expected, **NEAR)


@pytest.mark.parametrize("model", ["cpu"], indirect=True)
def test_experts_of_host_memory_are_pinned_and_copied_on_a_side_stream(cuda, model, monkeypatch):
    from mergekit_mediator.serve import prefetch

    used, copying = [], prefetch.CudaStream.copying

    def recorded(stream):
        used.append(stream._stream)
        return copying(stream)

    monkeypatch.setattr(prefetch.CudaStream, "copying", recorded)
    with model.mixture(NAMES[0]):
        pass
    assert len(used) == len(model.manifest.routed_layers)
    assert torch.cuda.current_stream(cuda) not in used
    kept = list(model._mixer.experts._decoded.values())
    assert all(s.codes.is_pinned() for s in kept if s.codes.numel())
