"""Every value form is encoded and decoded on the device as on the processor."""

from dataclasses import astuple

import numpy as np
import pytest
import torch

from mergekit_mediator.delta.approximate import approximate
from mergekit_mediator.delta.decomposition import decompose
from mergekit_mediator.delta.factors import Factors, unrounded
from mergekit_mediator.delta.kth_largest import compare
from mergekit_mediator.delta.random_sign import encode_random_sign
from mergekit_mediator.delta.random_sign_costs import random_sign_tradeoff
from mergekit_mediator.delta.sparse import encode
from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.delta.tradeoff import tradeoff
from mergekit_mediator.delta.value_forms import VALUES
from mergekit_mediator.store.codec import decode_bytes, encode_bytes

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
CPU = torch.device("cpu")


def pair(dtype, shape=(150, 200)):
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(shape, generator=generator).to(dtype)
    return (dense.float() + 0.1 * torch.randn(shape, generator=generator)).to(dtype), dense


def difference(out=120, width=90, rank=6, noise=0.02):
    generator = torch.Generator().manual_seed(3)
    left = torch.randn(out, rank, generator=generator)
    right = torch.randn(rank, width, generator=generator)
    return 0.1 * left @ right + noise * torch.randn(out, width, generator=generator)


def codes(stored):
    """The codes of all coordinates, 0 for those that are not stored."""
    flat = torch.zeros(stored.shape).view(-1)
    flat[stored.positions] = stored.codes.float()
    return flat


def squared_error(stored, tau):
    found = stored.to(CPU).change(torch.zeros(tau.shape))
    return float((found.double() - tau.double()).square().sum())


@every_dtype
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("density", [0.1, 1.0])
def test_sparse_forms_are_those_of_the_processor(device, dtype, values, density):
    expert, dense = pair(dtype)
    expected = encode(expert, dense, density, values)
    for found in (
        encode(expert, dense, density, values, str(device)),
        encode(expert.to(device), dense.to(device), density, values, str(device)),
    ):
        assert found.positions.device == found.codes.device == CPU
        assert found.scale == pytest.approx(expected.scale, rel=1e-5)
        if values == "exact":
            assert torch.equal(found.positions, expected.positions)
            assert torch.equal(found.codes, expected.codes)
        else:  # a number in the middle between two codes may go to either
            apart = (codes(found) - codes(expected)).abs()
            assert float(apart.max()) <= 1
            # few differences of 16-bit weights are not in the middle between two of the 255 codes
            assert int(apart.count_nonzero()) <= apart.numel() // 100


@every_dtype
@pytest.mark.parametrize("values", VALUES)
def test_sparse_forms_are_decoded_as_on_the_processor(device, dtype, values):
    expert, dense = pair(dtype)
    stored = decode_bytes(*encode_bytes(encode(expert, dense, 0.3, values), dense), "here", dense)
    placed = stored.to(device)
    assert placed.positions.device.type == device.type
    change = placed.change(dense.to(device)).cpu()
    torch.testing.assert_close(change, stored.change(dense), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("slope", [1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("fast", [False, True], ids=["full", "tf32"])
def test_steps_and_factors_lose_no_more_than_on_the_processor(device, tf32, slope, fast):
    tau = difference()
    expected = approximate(tau, slope, torch.bfloat16)
    tf32(fast)
    found = approximate(tau.to(device), slope, torch.bfloat16)
    assert expected.factors is not None
    assert found.factors is not None
    tensors = (found.positions, found.codes, found.factors.left, found.factors.scales)
    assert {tensor.device.type for tensor in tensors} == {device.type}
    assert squared_error(found, tau) == pytest.approx(squared_error(expected, tau), rel=0.02)
    assert abs(found.factors.rank - expected.factors.rank) <= 1


def test_tf32_changes_no_bit_of_steps_and_factors(device, tf32):
    found = []
    for fast in (False, True):
        tf32(fast)
        stored = approximate(difference().to(device), 1e-4, torch.float32)
        found.append(encode_bytes(stored.to(CPU))[0])
    assert torch.equal(*found)


@every_dtype
@pytest.mark.parametrize("shape", [(), (0,), (1,), (500,), (1, 5), (0, 4), (3, 4, 6)], ids=str)
def test_any_shape_is_approximated(device, dtype, shape):
    tau = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = approximate(tau.to(device), 1e-3, dtype)
    decoded = decode_bytes(*encode_bytes(found.to(CPU)), "here")
    assert squared_error(decoded, tau) <= 0.01 * float(tau.double().square().sum()) + 1e-12


@pytest.mark.parametrize("fast", [False, True], ids=["full", "tf32"])
def test_steps_come_back_from_bytes_as_the_device_meant_them(device, tf32, fast):
    tf32(fast)
    found = approximate(difference().to(device), 1e-5, torch.float32)
    decoded = decode_bytes(*encode_bytes(found.to(CPU)), "here").to(device)
    meant = found.change(torch.zeros(120, 90, device=device))
    again = decoded.change(torch.zeros(120, 90, device=device))
    torch.testing.assert_close(again, meant, rtol=1e-5, atol=1e-6)
    # without full precision of all products this error would be several times as large
    assert float((again.cpu() - difference()).abs().max()) < 2e-2


@every_dtype
@pytest.mark.parametrize("rank", [3, 40])
def test_factors_of_adapters_stay_where_they_are_and_are_exact(device, dtype, rank):
    generator = torch.Generator().manual_seed(0)
    lora_b = torch.randn(30, rank, generator=generator).to(dtype)
    lora_a = torch.randn(rank, 20, generator=generator).to(dtype)
    factors = Factors.of_adapter(lora_b.to(device), lora_a.to(device), 0.5)
    stored = StoredWeight.of_factors((30, 20), dtype, factors)
    tensors = (stored.positions, stored.codes, factors.left, factors.right, factors.scales)
    assert {tensor.device.type for tensor in tensors} == {device.type}
    expected = 0.5 * lora_b.double() @ lora_a.double()
    change = stored.change(torch.zeros(30, 20, device=device)).cpu().double()
    torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-5)
    on_cpu = StoredWeight.of_factors((30, 20), dtype, Factors.of_adapter(lora_b, lora_a, 0.5))
    if rank == 3:  # taken without arithmetic
        assert torch.equal(encode_bytes(stored.to(CPU))[0], encode_bytes(on_cpu)[0])


def test_codes_of_factors_are_unrounded_on_the_device(device):
    tau = difference()
    factors = approximate(tau, 1e-3, torch.float32).factors
    for found, expected in zip(
        unrounded(tau.to(device), factors), unrounded(tau, factors), strict=True
    ):
        assert found.device.type == device.type
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("fast", [False, True], ids=["full", "tf32"])
@pytest.mark.parametrize("shape", [(120, 90), (40,)], ids=str)
@pytest.mark.parametrize(
    "predict", [tradeoff, lambda tau: random_sign_tradeoff(tau, 1.0)], ids=["steps", "signs"]
)
def test_predicted_costs_are_those_of_the_processor(device, tf32, predict, shape, fast):
    tau = difference() if len(shape) == 2 else difference()[0, :40]
    expected = predict(tau)
    tf32(fast)
    found = predict(tau.to(device))
    assert found.device == CPU
    torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-5)


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_random_signs_are_those_of_the_processor(device, density):
    """But where a number is as likely stored as not: sums differ in their last bits."""
    tau = difference()
    dense = torch.zeros_like(tau)
    expected = encode_random_sign(tau, dense, density)
    found = encode_random_sign(tau, dense, density, str(device))
    assert torch.equal(found.positions, expected.positions)
    same = (found.codes.sign() == expected.codes.sign()).double().mean()
    assert float(same) > 0.95
    assert found.scale == pytest.approx(expected.scale, rel=0.05)


def test_components_that_are_kept_for_later_give_the_same_bytes(device):
    tau = difference().to(device)
    components = decompose(tau).storable()
    again, at_once = (
        approximate(tau, 1e-3, torch.float32, components=given) for given in (components, None)
    )
    assert torch.equal(encode_bytes(again.to(CPU))[0], encode_bytes(at_once.to(CPU))[0])
    assert astuple(again.to(CPU))[:3] == astuple(at_once.to(CPU))[:3]


@pytest.mark.parametrize(
    "how",
    [np.greater, np.greater_equal, np.less, np.less_equal, np.equal],
    ids=lambda h: h.__name__,
)
def test_a_device_compares_as_the_processor_does(device, how):
    values = torch.tensor([0.0, -0.0, 0.1, 0.3, torch.nan, torch.inf, -torch.inf, -0.1])
    for limit in (0.0, float(values[2]), float(values[3]), torch.inf):
        expected = how(values.numpy(), np.float32(limit)).tolist()
        assert compare(values.to(device), limit, how).tolist() == expected
