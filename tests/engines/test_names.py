import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_mediator.engines.names import (
    adapter_id,
    check_names,
    name_of,
    parse,
    rounded,
)
from mergekit_mediator.errors import EngineError, MixtureError
from mergekit_mediator.serve.mixture import DENSE, Mixture

EXPERTS = ("math", "code", "chat")
weights = st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda w: sum(w) > 0)


@given(weights, st.sampled_from([1, 4, 8, 10]), st.floats(0.05, 1))
def test_rounded_weights_are_multiples_that_keep_the_total(row, grid, total):
    mixture = Mixture.of_row([total * p / sum(row) for p in row], EXPERTS)
    near = rounded(mixture, grid)
    assert all(float(p * grid).is_integer() for _, p in near.weights)
    assert abs(near.total - mixture.total) <= 0.5 / grid + 1e-9
    assert all(abs(near.weight(name) - p) < 1 / grid + 1e-9 for name, p in mixture.weights)
    assert rounded(near, grid) == near


@given(weights)
def test_a_name_gives_its_mixture_back(row):
    mixture = rounded(Mixture.of_row([p / sum(row) for p in row], EXPERTS), 8)
    assert parse(name_of(mixture), EXPERTS, 8) == mixture


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("math", (("math", 1.0),)),
        ("dense", ()),
        ("code=0.4, math=0.6", (("math", 0.625), ("code", 0.375))),
        ("math=2,code=2", (("math", 0.5), ("code", 0.5))),
        ("math=0.5", (("math", 0.5),)),
        ("math=0.5,math=0.5", (("math", 1.0),)),
    ],
)
def test_names_of_clients_become_mixtures_in_the_order_of_the_artifact(name, expected):
    assert parse(name, EXPERTS, 8) == Mixture(expected)


def test_a_long_name_is_refused_at_once():
    began = time.monotonic()
    with pytest.raises(MixtureError, match="are required"):
        parse(" " * 3000 + ",math=1", EXPERTS, 8)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("name", ["gpt-4", "", "org/model", "auto"])
def test_names_of_another_form_are_the_engine_s_own(name):
    assert parse(name, EXPERTS, 8) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("law=1", "unknown expert 'law'; this model has math, code, chat"),
        ("math=x", "'math=x': the weight of 'math' must be a number, got 'x'"),
        ("math=", "the weight of 'math' must be a number, got ''"),
        ("math=-1,code=2", "weight must be finite and at least 0"),
        ("math=nan", "weight must be finite"),
        ("math=0.5,code", "an expert's name or weights such as math=0.5,code=0.5 are required"),
        ("math=0.01", "a weight of at least 0.0625 is required, because"),
    ],
)
def test_names_that_are_no_mixture_are_refused(name, message):
    with pytest.raises(MixtureError, match=message):
        parse(name, EXPERTS, 8)


def test_the_number_of_an_adapter_is_the_same_everywhere_and_differs_by_name_and_artifact():
    names = [name_of(m) for m in (DENSE, Mixture.of("math", EXPERTS), Mixture.of("code", EXPERTS))]
    numbers = [adapter_id(digest, name) for digest in ("a", "b") for name in names]
    assert len(set(numbers)) == 6
    assert all(1 <= number < 2**31 for number in numbers)
    assert adapter_id("a", "math") == 1002998026


@pytest.mark.parametrize("name", ["auto", "dense"])
def test_experts_with_names_that_mean_something_else_are_refused(name):
    check_names(EXPERTS)
    with pytest.raises(EngineError, match=f"expert '{name}': .* merge again with another name"):
        check_names([*EXPERTS, name])
