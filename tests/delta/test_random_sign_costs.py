import pytest
import torch

from mergekit_mediator.delta.factors import squared_norm
from mergekit_mediator.delta.random_sign import encode_random_sign
from mergekit_mediator.delta.random_sign_costs import density_at, random_sign_tradeoff
from mergekit_mediator.delta.tradeoff import SLOPES
from mergekit_mediator.store.codec import encode_bytes


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def structured():
    """A change with a strong direction, and rows of different sizes."""
    direction = drawn(600, 1, seed=1) @ drawn(1, 800, seed=2)
    return drawn(600, 800) * torch.linspace(0.5, 2, 600)[:, None] + 2 * direction


@pytest.mark.parametrize("change", [drawn(600, 800), structured()], ids=["plain", "structured"])
@pytest.mark.parametrize("density", [0.05, 0.2, 1.0])
def test_bits_and_error_are_those_of_the_stored_form(change, density):
    difference = 1e-3 * change
    place = min(range(len(SLOPES)), key=lambda k: abs(density_at(difference, SLOPES[k]) - density))
    bits, error, whole, base = random_sign_tradeoff(difference, squared_norm(2 * difference))[
        :, place
    ].tolist()
    dense = torch.zeros_like(difference)
    stored = encode_random_sign(difference, dense, density_at(difference, SLOPES[place]))
    content, _ = encode_bytes(stored, dense)
    assert bits == pytest.approx(8 * content.numel(), rel=0.06)
    left = float((stored.change(dense) - difference).square().sum())
    assert error == pytest.approx(left, rel=0.1)
    assert whole == pytest.approx(float(difference.square().sum()))
    assert base == pytest.approx(4 * whole)


def test_the_density_is_in_proportion_to_the_size_of_the_change():
    change = drawn(40, 50)
    assert density_at(1e-3 * change, 1e-3) == pytest.approx(2 * density_at(5e-4 * change, 1e-3))
    assert density_at(change, 1e-9) == 1


def test_finer_slopes_take_no_fewer_bits_and_make_no_more_noise():
    bits, error, *_ = random_sign_tradeoff(1e-3 * structured(), squared_norm(structured()))
    assert (bits.diff() >= 0).all()
    assert (error.diff() <= 1e-12).all()


def test_few_changed_coordinates_take_the_bits_of_exact_numbers():
    difference = torch.zeros(200, 300)
    changed = drawn(200, 300, seed=1) > 2.7
    difference[changed] = 1e-3 * drawn(200, 300)[changed]
    bits, error, *_ = random_sign_tradeoff(difference, squared_norm(torch.ones_like(difference)))
    dense = torch.zeros_like(difference).bfloat16()
    stored = encode_random_sign(difference.bfloat16(), dense, 1.0)
    content, _ = encode_bytes(stored, dense)
    assert stored.values == "exact"
    assert float(bits[-1]) == pytest.approx(8 * content.numel(), rel=0.3)
    assert float(error[-1]) == 0


@pytest.mark.parametrize("shape", [(30, 40), (50,), (0,), (1, 60)])
def test_weights_without_a_change_have_no_error(shape):
    bits, error, whole, _ = random_sign_tradeoff(
        torch.zeros(shape), squared_norm(torch.ones(shape))
    )
    assert not error.any()
    assert not whole.any()
    assert bits.isfinite().all()
