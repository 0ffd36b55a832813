"""Contexts end, and hooks are removed, at every moment at which an interrupt may fall."""

import contextlib

import pytest
from moments import moments
from torch import nn

from mergekit_mediator.models.hooks import Hook, hooked
from mergekit_mediator.models.scope import scope, undoing


@scope
def inside(places, place):
    """Put a place on the list for the duration of the context."""
    with undoing(lambda: place in places and places.remove(place)):
        places.append(place)
        yield place


def test_a_scope_ends_with_its_block_and_gives_the_value_that_the_generator_yields():
    places = []
    with inside(places, "house") as house, inside(places, "room") as room:
        assert places == ["house", "room"] == [house, room]
    assert places == []


def test_an_error_ends_a_scope_and_reaches_the_caller():
    places = []
    with pytest.raises(ZeroDivisionError), inside(places, "house"):
        raise ZeroDivisionError
    assert places == []


def test_an_error_at_the_end_of_a_scope_reaches_the_caller():
    @scope
    def failing():
        try:
            yield
        finally:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), failing():
        pass


def test_an_exit_stack_enters_and_ends_scopes():
    places = []
    with contextlib.ExitStack() as stack:
        assert stack.enter_context(inside(places, "house")) == "house"
        assert places == ["house"]
    assert places == []


def test_an_undo_function_runs_to_its_end_however_often_it_is_interrupted():
    tasks = [3, 2, 1]

    def undo():
        if tasks:
            tasks.pop()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), undoing(undo):
        pass
    assert tasks == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError])
def test_a_scope_has_ended_when_an_interrupt_of_any_moment_reaches_the_caller(error):
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


def test_hooks_are_called_inside_the_context_only_and_reset_at_its_end():
    module, calls = nn.Linear(2, 2), []
    hooks = [
        Hook(module, lambda *_: calls.append("after")),
        Hook(module, lambda *_: calls.append("before"), True, lambda: calls.append("reset")),
    ]
    with hooked(hooks):
        module(module.weight)
        assert calls == ["before", "after"]
    module(module.weight)
    assert set(calls[2:]) == {"reset"}
