import itertools
import math

import pytest
import torch

from mergekit_mediator.delta.allocation import Allocation
from mergekit_mediator.delta.kept import NOISE_POWER, kept_in_noise
from mergekit_mediator.delta.loss_law import DIVERGENCE_POWER, LOSS_POWER, NOISE
from mergekit_mediator.delta.tradeoff import SLOPES, tradeoff
from mergekit_mediator.errors import ConfigError

AT = torch.arange(len(SLOPES), dtype=torch.float64)


def exponential(scale, half, energy=1.0):
    """Bits that grow with the slope's place, and an error that halves every `half` places."""
    return torch.stack([scale * AT, energy * 2.0 ** (-AT / half), *sizes(energy, 0)])


def sizes(*norms):
    return [torch.full_like(AT, norm) for norm in norms]


def place(slope):
    return -2 * torch.tensor(slope).log2()


def loss(left):
    return sum(x**LOSS_POWER for x in left)


def test_equal_experts_share_equally():
    shared = Allocation([exponential(10, 4)] * 3)
    first, second, third = shared.slopes(900)
    assert first == second == third
    assert place(first) == pytest.approx(30, abs=0.05)


def test_the_size_of_a_change_alone_makes_no_difference():
    shared = Allocation([exponential(10, 4, energy=1e-4), exponential(10, 4, energy=1e4)])
    small, large = shared.slopes(700)
    assert small == large


def test_every_expert_takes_the_fewest_bits_that_keep_its_part():
    shared = Allocation([exponential(10, 4), exponential(10, 8)])
    slopes = shared.slopes_to_keep([0.99, 0.99])
    # a hundredth of the gain is lost where 1.2 (2^(-place / half))² is
    for slope, half in zip(slopes, (4, 8), strict=True):
        assert place(slope) == pytest.approx(-half * math.log2(math.sqrt(0.01 / 1.2)), abs=0.02)
    assert all(0.99 <= kept < 0.9903 for kept in shared.kept(slopes))
    assert shared.spent(slopes) == pytest.approx(10 * float(sum(map(place, slopes))), rel=0.01)


def test_more_is_kept_in_more_bits():
    shared = Allocation([exponential(10, 4)])
    spent = [shared.spent(shared.slopes_to_keep([keep])) for keep in (0.5, 0.9, 0.99, 0.999)]
    assert spent == sorted(set(spent))


def test_no_other_division_loses_less():
    curves = [exponential(10, 3), exponential(14, 7), exponential(6, 12)]
    shared = Allocation(curves)
    found = loss(shared.left(900))
    tried = 0
    for places in itertools.product(range(0, 100, 2), repeat=3):
        if sum(float(c[0][p]) for c, p in zip(curves, places, strict=True)) <= 900:
            tried += 1
            assert (
                found <= loss([float(c[1][p]) for c, p in zip(curves, places, strict=True)]) + 1e-9
            )
    assert tried > 1000


@pytest.mark.parametrize("bits", [8_000, 50_000, 400_000])
def test_bits_are_spent_and_never_exceeded(bits):
    generator = torch.Generator().manual_seed(0)
    measured = [tradeoff(s * torch.randn(60, 40, generator=generator)) for s in (1e-3, 1e-2, 3.0)]
    shared = Allocation(measured)
    slopes = shared.slopes(bits)
    spent = 0.0
    for curve, slope in zip(measured, slopes, strict=True):
        at = float(place(slope))
        low = int(at)
        high = min(low + 1, len(SLOPES) - 1)
        between = curve[0].log1p()
        spent += float((between[low] + (at - low) * (between[high] - between[low])).expm1())
    assert spent <= bits * 1.001
    if bits < shared.most:
        assert spent > 0.9 * bits


def test_an_expert_that_is_the_base_takes_nothing_from_the_others():
    nothing = tradeoff(torch.zeros(60, 40))
    change = tradeoff(torch.randn(60, 40, generator=torch.Generator().manual_seed(0)))
    _, alone = Allocation([nothing, change]).slopes(6000)
    assert alone == pytest.approx(Allocation([change]).slopes(6000)[0], rel=0.05)


def test_more_than_everything_takes_the_finest_slope():
    shared = Allocation([exponential(10, 4)] * 2)
    assert shared.left(10 * shared.most) == pytest.approx([0.0, 0.0], abs=1e-3)


def test_fewer_bits_than_the_least_are_refused():
    vectors = tradeoff(torch.randn(100, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(
        ConfigError, match=r"budget: 163 bytes for experts required at least, 12 are"
    ):
        Allocation([vectors, vectors]).slopes(100)


def test_the_expert_whose_answers_diverge_more_gets_the_bits():
    curves = [exponential(10, 4)] * 2
    equal = Allocation(curves).slopes(800)[0]
    shared = Allocation(curves, [{equal: 0.16}, {equal: 0.01}])
    first, second = shared.slopes(800)
    assert first < equal < second
    # the divergence is a power of the slope, so equal prices mean equal divergences
    power = DIVERGENCE_POWER / 2
    assert 0.16 * (first / equal) ** power == pytest.approx(
        0.01 * (second / equal) ** power, rel=0.05
    )


def noise(share, energy=1.0, base=1e6):
    """Bits in proportion to a density that grows with the slope's place up to 1, and the noise of it."""
    density = (share * 2.0 ** (AT / 4)).clamp(max=1)
    return torch.stack([1000 * density, energy * 2 / density, *sizes(energy, base)])


def test_noise_is_kept_to_what_the_part_of_the_gain_allows():
    shared = Allocation([noise(1e-4), noise(1e-3, energy=1e-6)], laws=[NOISE] * 2)
    parts = [float(kept_in_noise(noise, 0)) for noise in (5, 10)]
    slopes = shared.slopes_to_keep(parts)
    assert shared.kept(slopes) == pytest.approx(parts, abs=1e-3)
    # densities of 0.4 and 0.2
    assert shared.spent(slopes) == pytest.approx(600, rel=0.02)


def test_experts_with_as_much_noise_get_as_many_bits():
    shared = Allocation([noise(1e-4), noise(1e-3, energy=1e-6)], laws=[NOISE] * 2)
    first, second = (float(place(slope)) for slope in shared.slopes(200))
    assert 1e-4 * 2 ** (first / 4) == pytest.approx(1e-3 * 2 ** (second / 4), rel=0.02)
    assert shared.spent(shared.slopes(200)) == pytest.approx(200, rel=0.01)


def test_bits_go_where_noise_diverges_more():
    """The divergence d / pⁿ of densities p has the least sum where p is as the root of 1 + n of d."""
    shared = Allocation([noise(1e-3)] * 2, laws=[NOISE] * 2)
    equal = shared.slopes(400)[0]
    shared = Allocation([noise(1e-3)] * 2, [{equal: 0.16}, {equal: 0.01}], [NOISE] * 2)
    first, second = (float(place(slope)) for slope in shared.slopes(400))
    assert 2 ** ((first - second) / 4) == pytest.approx(16 ** (1 / (1 + NOISE_POWER)), rel=0.02)


def test_the_finest_slope_is_taken_where_none_keeps_enough():
    shared = Allocation([noise(1e-3)], laws=[NOISE])
    slopes = shared.slopes_to_keep([0.9999])
    assert shared.kept(slopes)[0] < 0.9999
    assert shared.spent(slopes) == pytest.approx(shared.most)


def test_a_change_that_is_large_beside_the_base_takes_more_signs():
    small, large = noise(1e-3, base=1e6), noise(1e-3, base=2.6e3)
    shared = Allocation([small, large], laws=[NOISE] * 2)
    slopes = shared.slopes_to_keep([0.9, 0.9])
    assert shared.kept(slopes) == pytest.approx([0.9, 0.9], abs=2e-3)
    # a noise of four times the change, where 65 times its part of the base is a tenth
    assert 2 / (1e-3 * 2 ** (float(place(slopes[1])) / 4)) == pytest.approx(4, rel=0.02)
    assert slopes[1] < slopes[0]


def test_a_heavy_change_is_not_said_to_be_kept_by_signs():
    shared = Allocation([noise(1e-3, base=600)], laws=[NOISE])
    assert shared.kept(shared.slopes_to_keep([0.99]))[0] < 0.9
