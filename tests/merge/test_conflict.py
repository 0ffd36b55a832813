import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_mediator.delta.chunks import CHUNK
from mergekit_mediator.merge import conflict
from mergekit_mediator.merge.conflict import METRICS, Conflict, measure, task_vectors
from mergekit_mediator.store.manifest import read_manifest

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def naive_sums(base, experts, denoise):
    """The formulas of the module's docstring, coordinate by coordinate in Python."""
    taus = [(e.float() - base.float()).reshape(-1).tolist() for e in experts]
    n = len(taus[0])
    count = min(n, max(1, round(denoise * n))) if n else 0
    signs = []
    for tau in taus:
        least = sorted((abs(v) for v in tau), reverse=True)[count - 1] if n else 0.0
        signs.append([(v > 0) - (v < 0) if abs(v) >= least else 0 for v in tau])
    shared = opposed = 0
    overlap, mass, spread, energy = [], [], [], []
    for j in range(n):
        values = [tau[j] for tau in taus]
        changed = [sign[j] for sign in signs if sign[j]]
        shared += len(changed) >= 2
        opposed += len(changed) >= 2 and len(set(changed)) == 2
        positive = sum(v for v in values if v > 0)
        negative = -sum(v for v in values if v < 0)
        overlap.append(2 * min(positive, negative))
        mass.append(positive + negative)
        mean = sum(values) / len(values)
        spread.append(sum((v - mean) ** 2 for v in values))
        energy.append(sum(v * v for v in values))
    return shared, opposed, *map(math.fsum, (overlap, mass, spread, energy))


def naive_metrics(sums):
    shared, opposed, overlap, mass, spread, energy = sums
    return {
        "sign": opposed / shared if shared else 0.0,
        "mass": overlap / mass if mass else 0.0,
        "dispersion": spread / energy if energy else 0.0,
    }


@st.composite
def models(draw):
    """A base and experts, with zeros, ties and equal experts among them."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.sampled_from([(), (0,), (1,), (5,), (4, 6), (2, 3, 5)]))
    count = draw(st.integers(2, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    base = torch.randn(shape, generator=generator).to(dtype)
    experts = []
    for _ in range(count):
        step = draw(st.sampled_from(["noise", "ties", "none"]))
        change = torch.randn(shape, generator=generator)
        if step == "ties":
            change = torch.randint(-2, 3, shape, generator=generator).float()
        experts.append(base if step == "none" else (base.float() + 0.125 * change).to(dtype))
    return base, experts


@given(models(), st.floats(0.01, 1))
def test_metrics_of_a_tensor_equal_a_naive_oracle(model, denoise):
    measured, expected = measure(*model, denoise), naive_metrics(naive_sums(*model, denoise))
    for metric in METRICS:
        assert measured.value(metric) == pytest.approx(expected[metric], abs=1e-6)


@given(st.lists(models(), min_size=1, max_size=4), st.floats(0.01, 1))
def test_metrics_of_a_layer_equal_a_naive_oracle_over_its_tensors(tensors, denoise):
    measured = sum((measure(*t, denoise) for t in tensors), Conflict())
    sums = [naive_sums(*t, denoise) for t in tensors]
    expected = naive_metrics([math.fsum(column) for column in zip(*sums, strict=True)])
    for metric in METRICS:
        assert measured.value(metric) == pytest.approx(expected[metric], abs=1e-6)


@given(models(), st.floats(0.01, 1))
def test_metrics_are_fractions(model, denoise):
    assert all(0 <= measure(*model, denoise).value(metric) <= 1 for metric in METRICS)


@given(models(), st.floats(0.01, 1), st.randoms())
def test_the_order_of_experts_does_not_matter(model, denoise, random):
    base, experts = model
    shuffled = random.sample(experts, len(experts))
    first, second = measure(base, experts, denoise), measure(base, shuffled, denoise)
    assert (first.shared, first.opposed) == (second.shared, second.opposed)
    for metric in METRICS:
        assert first.value(metric) == pytest.approx(second.value(metric), abs=1e-6)


def test_identical_experts_do_not_conflict():
    base, tau = torch.zeros(100), torch.randn(100)
    measured = measure(base, [tau, tau, tau], 0.5)
    assert measured.shared == 50
    assert all(measured.value(metric) == pytest.approx(0, abs=1e-6) for metric in METRICS)


def test_opposite_experts_conflict_fully():
    base, tau = torch.zeros(100), torch.randn(100)
    measured = measure(base, [tau, -tau], 1.0)
    assert all(measured.value(metric) == pytest.approx(1, abs=1e-6) for metric in METRICS)


def test_experts_that_change_nothing_do_not_conflict():
    base = torch.randn(100)
    assert measure(base, [base, base], 0.2) == Conflict(has_sign=True)


def test_denoising_ignores_the_signs_of_small_changes():
    large = torch.tensor([1.0, 1.0, 0, 0, 0, 0, 0, 0, 0, 0])
    small = torch.tensor([0.0, 0.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    base, experts = torch.zeros(10), [large + small, large - small]
    assert measure(base, experts, 0.2).sign == 0
    assert measure(base, experts, 1.0).sign == pytest.approx(0.8)


def test_mass_is_computed_without_denoising():
    base, experts = torch.zeros(4), [torch.tensor([4.0, 1, 1, 1]), torch.tensor([4.0, -1, -1, -1])]
    assert measure(base, experts, 0.25).mass == pytest.approx(6 / 14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_of_many_chunks_is_measured_like_one_of_a_single_chunk(dtype):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40, 50, generator=generator).to(dtype)
    experts = [(base + torch.randn(40, 50, generator=generator) * 0.1).to(dtype) for _ in range(3)]
    whole = measure(base, experts, 0.2)
    times = 3 * CHUNK // base.numel()
    parts = measure(base.repeat(times, 1), [e.repeat(times, 1) for e in experts], 0.2)
    assert (parts.shared, parts.opposed) == (times * whole.shared, times * whole.opposed)
    for metric in METRICS:
        assert parts.value(metric) == pytest.approx(whole.value(metric), abs=1e-5)


def test_a_large_tensor_equals_a_sorting_oracle():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(700_000, generator=generator)
    experts = [base + 0.1 * torch.randn(700_000, generator=generator) for _ in range(3)]
    taus = torch.stack([e - base for e in experts]).double()
    least = taus.abs().sort(dim=1, descending=True).values[:, 140_000 - 1, None]
    signs = taus.sign() * (taus.abs() >= least)
    shared = signs.abs().sum(0) >= 2
    opposed = shared & (signs.amax(0) > 0) & (signs.amin(0) < 0)
    positive, negative = taus.clamp(min=0).sum(0), (-taus).clamp(min=0).sum(0)
    mass = 2 * torch.minimum(positive, negative).sum() / (positive + negative).sum()
    dispersion = (taus - taus.mean(0)).square().sum() / taus.square().sum()
    measured = measure(base, experts, 0.2)
    assert measured.sign == pytest.approx(float(opposed.sum() / shared.sum()), abs=1e-6)
    assert measured.mass == pytest.approx(float(mass), abs=1e-6)
    assert measured.dispersion == pytest.approx(float(dispersion), abs=1e-6)


def test_task_vectors_are_float32_whatever_is_stored():
    base, expert = torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.float16)
    (tau,) = task_vectors(base, [expert])
    assert tau.dtype == torch.float32


def test_coordinates_that_are_not_finite_count_as_unchanged():
    base = torch.zeros(4)
    bad = torch.tensor([math.nan, math.inf, 1.0, 1.0])
    clean = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert measure(base, [bad, clean], 1.0) == measure(base, [clean, clean], 1.0)


def test_the_inputs_are_left_alone():
    base, experts = torch.randn(50), [torch.randn(50), torch.randn(50)]
    before = [t.clone() for t in (base, *experts)]
    conflict.measure(base, experts, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(before, (base, *experts), strict=True))


@pytest.mark.parametrize(
    ("asked_for", "measured"),
    [("sign", set(conflict.METRICS)), ("mass", {"mass", "dispersion"})],
)
def test_the_conflict_of_every_layer_is_that_of_its_weights(
    family, merged, read, asked_for, measured
):
    out = merged(family.config(route="none", denoise=0.3, conflict=asked_for))
    base, experts = read(family.base), [read(path) for path in family.experts.values()]
    for layer in read_manifest(out).layers:
        sums = [conflict.measure(base[w], [e[w] for e in experts], 0.3) for w in layer.weights]
        whole = sum(sums, conflict.Conflict())
        assert set(layer.conflict) == measured
        for metric, value in layer.conflict.items():
            assert value == pytest.approx(whole.value(metric), abs=1e-6)


@pytest.mark.parametrize("metric", conflict.METRICS)
def test_auto_routes_the_layers_of_most_conflict(family, merged, metric):
    layers = read_manifest(merged(family.config(conflict=metric))).layers
    average = sum(layer.conflict[metric] for layer in layers) / len(layers)
    assert [layer.routed for layer in layers] == [x.conflict[metric] > average for x in layers]
    assert any(layer.routed for layer in layers)
