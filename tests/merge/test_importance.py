import pytest

from mergekit_mediator.merge.layers import importance


def test_the_middle_of_the_blocks_matters_twice_as_much_as_the_ends():
    factors = importance(["embed", *map(str, range(5)), "final"])
    ends, middle = 2**-0.5, 2**0.5
    assert list(factors.values()) == pytest.approx([1, ends, 1, middle, 1, ends, 1])


def test_a_layer_that_is_named_for_each_of_its_weights_is_one_layer():
    layers = ["embed", *map(str, range(5)), "final"]
    named = [name for i, name in enumerate(layers) for _ in range(i + 1)]
    assert importance(named) == importance(layers)
    assert importance(iter(named)) == importance(layers)


def test_blocks_are_in_the_order_of_their_numbers():
    factors = importance(["10", "9", "2"])
    assert factors["9"] > factors["2"] == pytest.approx(factors["10"])


def test_every_module_has_a_middle_of_its_own():
    factors = importance(["text.embed", "text.0", "text.1", "text.2", "vision.0", "vision.1"])
    assert factors["text.1"] == pytest.approx(2**0.5)
    assert factors["vision.0"] == factors["vision.1"] == factors["text.0"]


def test_a_single_block_weighs_as_much_as_any_other_weight():
    assert importance(["embed", "0"]) == {"embed": 1.0, "0": 1.0}
