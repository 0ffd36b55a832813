"""Interrupts while a mixture is entered and left: nothing of it stays in the model, wherever they fall."""

import itertools
import sys

import attack_interrupts
import pytest
import torch
from attack_interrupts import Target
from routed_pico import build

MIXTURE = {"math": 0.3, "chat": 0.7}
FORMS = ("mixture", "threads", "rows")


@pytest.fixture(scope="module", params=FORMS)
def target(request, make, tmp_path_factory):
    """A model of one block, served in one of the forms."""
    root, threads = tmp_path_factory.mktemp("out") / "out", torch.get_num_threads()
    build(root, make(lambda: attack_interrupts.pico.llama(num_hidden_layers=1)), density=0.2)
    yield Target(root, request.param)
    torch.set_num_threads(threads)


def interrupted(function, moment, error):
    """Raise an error at the moment of that number of a call; whether there was such a moment.

    Python handles signals, and raises what other threads ask for, where a function begins and after a call
    of C: a profiler is told of the same moments. A generator that is closed does not begin.
    """
    moments = itertools.count()

    def profile(frame, event, _argument):
        begins = event == "call" and not frame.f_code.co_flags & 0x20  # CO_GENERATOR
        if (begins or event == "c_return") and next(moments) == moment:
            sys.setprofile(None)
            raise error

    try:
        sys.setprofile(profile)
        function()
    except error:
        return True
    finally:
        sys.setprofile(None)
    return next(moments) > moment


# every moment, and some of another error than the one that is asked for again: that of an alarm
@pytest.mark.parametrize(("error", "step"), [(KeyboardInterrupt, 1), (TimeoutError, 7)])
@torch.no_grad()
def test_an_interrupt_at_any_moment_leaves_the_dense_expert(target, error, step):
    def enter_and_leave():
        if target.form == "rows":
            rows = target.model._choice.named("math"), target.model._choice.named(MIXTURE)
            with target.model._serving._rows.applied(rows):
                pass
        else:
            target.request(MIXTURE)

    enter_and_leave()
    for moment in itertools.count(step=step):
        if not interrupted(enter_and_leave, moment, error):
            break
        assert target.left() == "", moment
    assert moment > 100
    assert target.wrong(2) == ""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of more than one
@pytest.mark.parametrize(("form", "times"), [("threads", 1), ("rows", 3)])
def test_shots_at_random_moments_are_survived(form, times):
    """`python tests/attack_interrupts.py` shoots more often."""
    assert not attack_interrupts.attack(form, shots=40, seed=0, times=times)
