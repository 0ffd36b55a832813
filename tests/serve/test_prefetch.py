"""The order in which experts are read, copied and used; a fake stands in for the CUDA stream."""

from contextlib import contextmanager

import pytest
import torch

from mergekit_mediator.serve.prefetch import read_ahead, side_streams


class Recorded:
    """A stream that writes down what happens on it."""

    def __init__(self, events):
        self.events, self.copied = events, 0

    @contextmanager
    def copying(self):
        self.events.append("copy")
        try:
            yield
        finally:
            self.events.append("copied")

    def ready(self):
        self.copied += 1
        number = self.copied
        return lambda: self.events.append(f"wait {number}")


def run(events, streams):
    def read(layer):
        events.append(f"read {layer}")
        return layer.upper()

    for layer, found in read_ahead(["a", "b", "c"], read, streams):
        assert found == layer.upper()
        events.append(f"use {layer}")


def test_the_next_layer_is_read_before_the_present_one_is_used():
    events = []
    run(events, [])
    assert events == ["read a", "read b", "use a", "read c", "use b", "use c"]


def test_a_layer_is_used_when_its_own_copies_have_come_and_no_later():
    events = []
    run(events, [Recorded(events)])
    used = [event for event in events if event.split()[0] in ("wait", "use", "read")]
    expected = ["read a", "read b", "wait 1", "use a", "read c", "wait 2", "use b", "wait 3"]
    assert used == [*expected, "use c"]
    assert events[:3] == ["copy", "read a", "copied"]


def test_an_error_while_reading_ahead_leaves_the_stream():
    events = []

    def read(layer):
        if layer == "b":
            raise MemoryError

    layers = read_ahead("ab", read, [Recorded(events)])
    with pytest.raises(MemoryError):
        next(layers)
    assert events == ["copy", "copied", "copy", "copied"]


def test_nothing_is_copied_where_there_is_no_cuda_device():
    assert side_streams({torch.device("cpu")}) == []
