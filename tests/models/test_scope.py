import contextlib

import pytest
from moments import moments
from torch import nn

from mergekit_mediator.models.hooks import Hook, hooked
from mergekit_mediator.models.scope import scope, undoing


@scope
def inside(places, place):
    """Notes that a place is entered, and a place in it."""
    with undoing(lambda: place in places and places.remove(place)):
        places.append(place)
        yield place


def test_a_scope_is_left_at_its_end_and_gives_what_the_generator_yields():
    places = []
    with inside(places, "house") as house, inside(places, "room") as room:
        assert places == ["house", "room"] == [house, room]
    assert places == []


def test_an_error_leaves_a_scope_and_goes_on():
    places = []
    with pytest.raises(ZeroDivisionError), inside(places, "house"):
        raise ZeroDivisionError
    assert places == []


def test_an_error_of_leaving_is_raised():
    @scope
    def failing():
        try:
            yield
        finally:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), failing():
        pass


def test_scopes_may_be_on_a_stack():
    places = []
    with contextlib.ExitStack() as stack:
        assert stack.enter_context(inside(places, "house")) == "house"
        assert places == ["house"]
    assert places == []


def test_what_is_undone_is_undone_to_the_end_however_often_it_is_interrupted():
    left = [3, 2, 1]

    def undo():
        if left:
            left.pop()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), undoing(undo):
        pass
    assert left == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError])
def test_a_scope_is_left_when_an_interrupt_at_any_moment_reaches_the_caller(error):
    places, module = [], nn.Linear(2, 2)
    hooks = [Hook(module, lambda *_: None), Hook(module, lambda *_: None, before=True)]

    def enter_and_leave():
        with inside(places, "house"), hooked(hooks), inside(places, "room"):
            pass

    for moment in moments(enter_and_leave, error):
        assert places == [], moment
        assert not module._forward_hooks, moment
        assert not module._forward_pre_hooks, moment
    assert moment > 50


def test_hooks_are_called_inside_and_reset_what_they_did():
    module, called = nn.Linear(2, 2), []
    hooks = [
        Hook(module, lambda *_: called.append("after")),
        Hook(module, lambda *_: called.append("before"), True, lambda: called.append("reset")),
    ]
    with hooked(hooks):
        module(module.weight)
        assert called == ["before", "after"]
    module(module.weight)
    assert set(called[2:]) == {"reset"}
