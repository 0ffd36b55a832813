"""The weights of a model: where mixtures are put, and that the dense expert always comes back."""

import random
import signal
import threading

import pytest
import torch
from torch import nn

from mergekit_mediator.delta.factors import Factors
from mergekit_mediator.delta.random_sign import encode_random_sign
from mergekit_mediator.delta.sparse import encode
from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.errors import MixtureError
from mergekit_mediator.serve import placer
from mergekit_mediator.serve.mixer import Mixer
from mergekit_mediator.serve.residency import Experts
from mergekit_mediator.store.expert_file import ExpertFile, ExpertWriter

NAMES = ("a", "b", "c")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(24, 16, bias=False, dtype=torch.bfloat16)
        self.two = nn.Linear(16, 8, dtype=torch.bfloat16)


def bits(model):
    return {n: w.detach().view(torch.int16).clone() for n, w in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three experts of `Net`, at half density."""
    dense = Net().state_dict()
    root = tmp_path_factory.mktemp("experts")
    for seed, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(seed)
        writer = ExpertWriter(root / f"{name}.safetensors", name)
        for weight, value in dense.items():
            change = 0.1 * torch.randn(value.shape, generator=generator)
            expert = (value.float() + change).to(value.dtype)
            writer.write(weight, encode(expert, value, 0.5), value)
        writer.close()
    return {name: ExpertFile(root / f"{name}.safetensors") for name in NAMES}


def make_mixer(files, **options):
    model = Net()
    dense = {name: weight.clone() for name, weight in model.state_dict().items()}
    return model, Mixer(model, Experts(files, dense.__getitem__, **options))


@pytest.fixture
def mixer(files):
    return make_mixer(files)


def test_ten_thousand_random_mixtures_leave_no_flipped_bit(mixer):
    model, mixer = mixer
    before, draw = bits(model), random.Random(0)
    for _ in range(10_000):
        chosen = draw.sample(NAMES, draw.randint(1, 3))
        with mixer.mixture({name: draw.choice([0.2, 1.0, 1.7]) for name in chosen}):
            pass
    assert same(bits(model), before)


def test_an_exception_inside_a_mixture_restores_the_dense_expert(mixer):
    model, mixer = mixer
    before = bits(model)

    def fail():
        with mixer.mixture({"a": 1.0}):
            assert not same(bits(model), before)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert same(bits(model), before)


@pytest.mark.parametrize("moment", range(3))
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_error_while_entering_restores_the_dense_expert(mixer, monkeypatch, moment, error):
    model, mixer = mixer
    before, calls, mix_ = bits(model), iter(range(9)), placer.mix_

    def failing(weight, parts, saved):
        mix_(weight, parts, saved)
        if next(calls) == moment:
            raise error

    monkeypatch.setattr(placer, "mix_", failing)
    with pytest.raises(error), mixer.mixture({"a": 0.5, "b": 0.5}):
        raise AssertionError("entered")
    assert same(bits(model), before)
    assert not mixer.inside


@pytest.mark.parametrize("moment", range(3))
def test_an_interrupt_while_leaving_restores_everything_all_the_same(mixer, monkeypatch, moment):
    model, mixer = mixer
    before, calls, restore_ = bits(model), iter(range(9)), placer.restore_

    def interrupted(weight, saved):
        if next(calls) == moment:
            raise KeyboardInterrupt
        restore_(weight, saved)

    monkeypatch.setattr(placer, "restore_", interrupted)
    with pytest.raises(KeyboardInterrupt), mixer.mixture({"a": 1.0}):
        pass
    assert same(bits(model), before)


def test_real_interrupts_at_random_moments_leave_no_flipped_bit(mixer):
    model, mixer = mixer
    before, draw, interrupted = bits(model), random.Random(0), 0
    with mixer.mixture({"a": 0.5, "c": 0.5}):  # safetensors hides interrupts while it reads a file
        pass

    def interrupt(*_):
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(300):
            try:
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-5, 1e-3))
                for _ in range(50):
                    with mixer.mixture({"a": 0.3, "c": 0.7}):
                        pass
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            with mixer.mixture({}):  # the next use mends what a second interrupt may have left
                assert same(bits(model), before)
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert interrupted > 100


def test_large_models_are_restored_by_several_threads(mixer):
    model, mixer = mixer
    mixer.placer.parallel_from = 1
    before = bits(model)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with mixer.mixture({"a": 1.0}):
            alone = bits(model)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    mixer.placer.parallel_from = 1 << 22
    with mixer.mixture({"a": 1.0}):
        assert same(bits(model), alone)
    assert same(bits(model), before)


def test_layers_that_are_read_ahead_are_put_in_place_alike(files, mixer, monkeypatch):
    resident_model, resident = mixer
    model, _ = make_mixer(files)
    dense = {name: weight.clone() for name, weight in model.state_dict().items()}
    before, layers = (
        bits(model),
        (["one.weight", "a norm that none changes"], ["two.weight", "two.bias"]),
    )
    other = Mixer(model, Experts(files, dense.__getitem__, "cpu"), layers)
    monkeypatch.setattr(placer.Placer, "_on_cpu", False)  # as on CUDA, but for the streams
    for weights in ({"a": 1.0}, {"b": 0.4, "c": 0.6}):
        with resident.mixture(weights), other.mixture(weights):
            assert not same(bits(model), before)
            assert same(bits(resident_model), bits(model))
    assert same(bits(model), before)


def test_two_threads_never_see_each_others_mixture(mixer):
    model, mixer = mixer
    seen, expected, failures = threading.Barrier(2), {}, []
    for name in ("a", "b"):
        with mixer.mixture({name: 1.0}):
            expected[name] = bits(model)

    def request(name):
        seen.wait()
        for _ in range(200):
            with mixer.mixture({name: 1.0}):
                if not same(bits(model), expected[name]):
                    failures.append(name)

    threads = [threading.Thread(target=request, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_mixture_goes_into_weights_that_were_moved_or_cast(mixer):
    model, mixer = mixer
    with mixer.mixture({"a": 1.0}):
        expert = bits(model)
    model.float()
    with mixer.mixture({"a": 1.0}):
        assert same(bits(model.bfloat16()), expert)


def test_a_model_that_is_cast_inside_a_mixture_gets_the_dense_expert_back(mixer):
    model, mixer = mixer
    dense = {name: weight.float() for name, weight in model.state_dict().items()}
    with mixer.mixture({"a": 1.0}):
        model.float()
    assert all(torch.equal(dense[name], weight) for name, weight in model.state_dict().items())


def test_dense_weights_that_others_change_are_changed_for_good(mixer):
    model, mixer = mixer
    with mixer.mixture({"a": 1.0}):
        pass
    with torch.no_grad():
        model.one.weight.zero_()
    with mixer.mixture({"a": 1.0}):
        pass
    assert not model.one.weight.any()


def test_weights_outside_inference_mode_are_usable_after_a_mixture_inside_it(mixer):
    model, mixer = mixer
    before = bits(model)
    with torch.inference_mode(), mixer.mixture({"a": 1.0}):
        pass
    with mixer.mixture({"a": 0.5}):
        pass
    assert same(bits(model), before)


@pytest.mark.parametrize("options", [{"residency": "disk"}, {"residency": "cpu"}, {"budget": 600}])
def test_where_experts_live_does_not_change_a_mixture(files, mixer, options):
    model, resident = mixer
    other_model, other = make_mixer(files, **options)
    for weights in ({"a": 1.0}, {"b": 0.4, "c": 0.6}):
        with resident.mixture(weights), other.mixture(weights):
            assert same(bits(model), bits(other_model))


def test_the_least_recently_used_weights_go_when_the_budget_is_exceeded(files):
    _, unlimited = make_mixer(files)
    unlimited.placer.expert("a")
    one = unlimited.experts.resident_bytes
    _, mixer = make_mixer(files, budget=2 * one)
    for name in ("a", "b", "a", "c"):
        mixer.placer.expert(name)
        assert mixer.experts.resident_bytes <= 2 * one
    assert {expert for expert, _ in mixer.experts._decoded} == {"a", "c"}


def test_nothing_is_decoded_before_it_is_used_and_nothing_kept_on_disk(files):
    _, mixer = make_mixer(files, residency="disk")
    mixer.placer.expert("a")
    assert mixer.experts.resident_bytes == 0
    _, mixer = make_mixer(files)
    assert mixer.experts.resident_bytes == 0


def test_random_signs_take_memory_for_what_they_change_alone(tmp_path):
    dense = torch.zeros(64, 96)
    expert = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    stored = encode_random_sign(expert, dense, 0.5)
    writer = ExpertWriter(tmp_path / "a.safetensors", "a")
    writer.write("w", stored)
    writer.close()
    experts = Experts({"a": ExpertFile(tmp_path / "a.safetensors")}, lambda _: dense)
    read = experts.read("a", "w", dense.device)
    assert experts.resident_bytes == 6 * int(stored.codes.count_nonzero())
    assert torch.equal(read.change(dense), stored.change(dense))


def test_experts_in_host_memory_stay_there_when_they_are_copied_to_a_device(tmp_path):
    dense, device = torch.zeros(6, 8), torch.device("meta")  # the only other device that all have
    factors = Factors(torch.ones(6, 2), torch.ones(8, 2), torch.ones(2))
    writer = ExpertWriter(tmp_path / "a.safetensors", "a")
    writer.write("w", StoredWeight.of_factors((6, 8), torch.float32, factors))
    writer.close()
    experts = Experts({"a": ExpertFile(tmp_path / "a.safetensors")}, lambda _: dense, "cpu")
    for _ in range(2):
        copied = experts.read("a", "w", device)
        parts = (copied.factors.left, copied.factors.right, copied.factors.scales)
        assert {tensor.device for tensor in (copied.positions, copied.codes, *parts)} == {device}
        assert experts.resident_bytes > 0
    assert experts.read("a", "w", dense.device).factors.left.device.type == "cpu"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"x": 1.0}, "unknown expert 'x'; this model has a, b, c"),
        ({"a": -0.5}, "expert 'a': weight must be finite and at least 0, got -0.5"),
        ({"a": float("nan")}, "finite"),
        ({"a": 0.0, "b": 0}, "at least one weight above 0 is required"),
        ({"a": "1"}, "expert 'a': weight must be a number, got '1'"),
    ],
)
def test_weights_that_are_no_mixture_are_refused(mixer, weights, message):
    with pytest.raises(MixtureError, match=message), mixer[1].mixture(weights):
        raise AssertionError("entered")


def test_a_mixture_inside_a_mixture_is_refused_by_name(mixer):
    model, mixer = mixer
    before = bits(model)
    message = "a mixture of b is in place"
    with mixer.mixture({"b": 1.0}), pytest.raises(MixtureError, match=message):
        mixer.mixture({"a": 1.0}).__enter__()
    assert same(bits(model), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residency": "gpu"}, "device, cpu, disk, got 'gpu'"),
        ({"budget": 0}, "positive number"),
        ({"budget": "1GB"}, "positive number of bytes, or None, got '1GB'"),
    ],
)
def test_an_unknown_residency_or_budget_is_refused(files, options, message):
    with pytest.raises(MixtureError, match=message):
        make_mixer(files, **options)
