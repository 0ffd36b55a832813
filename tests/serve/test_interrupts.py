"""Interrupts while a mixture is entered and left: nothing of it stays in the model, wherever they fall."""

import attack_interrupts
import pytest
import torch
from attack_interrupts import MIXTURES, Target
from moments import moments
from routed_pico import build

from mergekit_mediator.delta.sparse import encode
from mergekit_mediator.serve.residency import Experts, stored_bytes


@pytest.fixture(scope="module", params=["mixture", "threads", "rows"])
def target(request, make, tmp_path_factory):
    """A model of one block, served in one of the forms."""
    root, threads = tmp_path_factory.mktemp("out") / "out", torch.get_num_threads()
    build(root, make(lambda: attack_interrupts.pico.llama(num_hidden_layers=1)), density=0.2)
    yield Target(root, request.param)
    torch.set_num_threads(threads)


# every moment, and some of an error that is not asked for again as interrupts are: that of an alarm
@pytest.mark.parametrize(("error", "step"), [(KeyboardInterrupt, 1), (TimeoutError, 7)])
@torch.no_grad()
def test_an_interrupt_at_any_moment_leaves_the_dense_expert(target, error, step):
    def enter_and_leave():
        if target.form == "rows":
            rows = [target.model._choice.named(mixture) for mixture in MIXTURES[1:]]
            with target.model._serving.rows.applied(tuple(rows)):
                pass
        else:
            target.request(MIXTURES[2])

    enter_and_leave()
    for moment in moments(enter_and_leave, error, step):
        assert target.left() == "", moment
    assert moment > 100
    assert target.wrong(2) == ""


@pytest.mark.parametrize("target", ["rows"], indirect=True)
@torch.no_grad()
def test_an_interrupt_while_a_request_is_routed_leaves_no_hook(target):
    router = target.model._choice._routers._response

    def record():
        with router.recording(target.model.model, torch.ones(1)):
            pass

    for moment in moments(record, KeyboardInterrupt):
        assert target.left() == "", moment


def test_bytes_of_experts_are_counted_right_wherever_reading_is_interrupted():
    class File:  # safetensors makes a ValueError of an interrupt
        def read(self, weight, dense):
            return encode(dense + 1, dense, 1.0)

    dense, names = torch.zeros(5), ("one", "two", "three")
    size = stored_bytes(File().read("one", dense))
    experts = Experts({"a": File(), "b": File()}, lambda _: dense, budget=3 * size)

    def read():
        for expert in experts.files:
            for name in names:
                experts.read(expert, name, dense.device)

    for moment in moments(read, KeyboardInterrupt):
        sizes = [stored_bytes(stored) for stored in experts._decoded.values()]
        assert experts.resident_bytes == sum(sizes), moment


@pytest.mark.parametrize(("form", "times"), [("threads", 1), ("rows", 3)])
def test_shots_at_random_moments_are_survived(form, times):
    """`python tests/helpers/attack_interrupts.py` shoots more often."""
    assert not attack_interrupts.attack(form, shots=40, seed=0, times=times)
