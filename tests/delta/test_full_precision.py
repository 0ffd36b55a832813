"""The setting of TF32 is off inside, and afterwards as it was; torch keeps it without a device, too."""

from threading import Barrier, Thread

import pytest
import torch

from mergekit_mediator.delta.full_precision import full_precision

MATMUL = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def _as_before():
    before = MATMUL.allow_tf32
    yield
    MATMUL.allow_tf32 = before


def allowed():
    """By the name that torch reads itself."""
    newer = hasattr(MATMUL, "fp32_precision")
    return MATMUL.fp32_precision == "tf32" if newer else MATMUL.allow_tf32


@pytest.mark.parametrize("on", [False, True])
def test_tf32_is_off_inside_and_comes_back(on):
    MATMUL.allow_tf32 = on

    @full_precision()
    def inner():
        return allowed()

    with full_precision():
        assert not inner()
        assert not allowed()
    assert MATMUL.allow_tf32 == on
    assert not inner()
    assert MATMUL.allow_tf32 == on


def test_an_error_inside_brings_the_setting_back():
    MATMUL.allow_tf32 = True
    with pytest.raises(ZeroDivisionError), full_precision():
        raise ZeroDivisionError
    assert MATMUL.allow_tf32


def test_the_last_of_several_threads_brings_the_setting_back():
    MATMUL.allow_tf32 = True
    entered, first_left, seen = Barrier(2), Barrier(2), []

    def late():
        with full_precision():
            entered.wait()
            first_left.wait()
            seen.append(allowed())

    thread = Thread(target=late)
    thread.start()
    with full_precision():
        entered.wait()
    first_left.wait()
    thread.join()
    assert seen == [False]
    assert MATMUL.allow_tf32


# torch 2.9 gave the setting a second name
NAMES = [name for name in ("allow_tf32", "fp32_precision") if hasattr(MATMUL, name)]


@pytest.mark.parametrize("name", NAMES)
def test_programs_are_served_whichever_name_they_use(name):
    settings = {"allow_tf32": (True, False), "fp32_precision": ("tf32", "ieee")}
    (on, _), (_, off) = settings[name], settings[NAMES[-1]]
    before = getattr(MATMUL, name)
    setattr(MATMUL, name, on)
    try:
        with full_precision():
            assert getattr(MATMUL, NAMES[-1]) == off
        assert getattr(MATMUL, name) == on
    finally:
        setattr(MATMUL, name, before)
