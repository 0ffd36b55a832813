"""Requests on several streams wait for each other; fakes stand in for CUDA. tests/gpu has the real ones."""

import pytest
import torch

from mergekit_mediator.serve import stream_order
from mergekit_mediator.serve.stream_order import StreamOrder

GPU = torch.device("cuda", 0)


class Cuda:
    """Streams by name, which write down what they record and wait for."""

    def __init__(self):
        self.events, self.present, self.initialized = [], "a", True

    def is_initialized(self):
        return self.initialized

    def current_stream(self, device):
        assert device == GPU
        return self

    def record_event(self):
        self.events.append(f"{self.present} ends")
        return self.present

    def wait_event(self, event):
        self.events.append(f"{self.present} waits for {event}")


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(stream_order, "_CUDA", cuda := Cuda())
    return cuda


def test_a_request_waits_for_the_one_before_on_its_device(cuda):
    order = StreamOrder()
    for cuda.present in "aba":
        order.begin()
        order.end(lambda: {GPU, torch.device("cpu")})
    expected = ["a ends", "b waits for a", "b ends", "a waits for b", "a ends"]
    assert cuda.events == expected


def test_nothing_is_looked_at_where_cuda_is_not_in_use(cuda):
    cuda.initialized, order = False, StreamOrder()
    order.begin()
    order.end(lambda: 1 / 0)
    assert cuda.events == []
