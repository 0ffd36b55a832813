"""The second moments are those of the inputs that a matrix reads; powers of 0 leave our form as it is."""

import pico
import pytest
import stored_forms
import torch
import weighed_errors

PAIRS = [([3, 5, 7, 11], [13, 2]), ([3, 5, 8, 11], [17, 2])]
WEIGHT = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def model():
    return pico.llama(tied=True).float().eval()


@pytest.fixture(scope="module")
def change(model):
    own = dict(model.named_parameters())
    expert = pico.perturbed(model, seed=1).state_dict()
    return stored_forms.Change({n: w.data for n, w in own.items()}, {n: expert[n] for n in own})


@pytest.fixture(scope="module")
def measured(model):
    return weighed_errors.moments_of(model, PAIRS, {WEIGHT})


def test_moments_are_sums_of_squares_over_the_tokens_that_are_read(model, measured):
    # The common beginning is read once, each ending for itself, and the last token of an answer never.
    read = torch.tensor([3, 5, 7, 11, 13, 8, 11, 17])
    with torch.no_grad():
        inputs = model.model.layers[0].input_layernorm(model.model.embed_tokens(read))
    torch.testing.assert_close(measured[WEIGHT].inputs, inputs.double().square().sum(0))
    assert (measured[WEIGHT].gradients > 0).all()


def test_measuring_leaves_no_gradient_and_no_hook(model, measured):
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._backward_hooks for m in model.modules())


def test_powers_of_zero_are_our_form(change, measured):
    plain, bits = weighed_errors.Weighed(measured, 0.0, 0.0)(change, 1.0)
    ours, expected_bits = stored_forms.ours(change, 1.0)
    assert bits == expected_bits
    for name, weight in ours.items():
        torch.testing.assert_close(plain[name], weight)


def test_scales_are_paid_for_and_divided_out(change, measured):
    weights, bits = weighed_errors.Weighed(measured, 1.0, 1.0)(change, 4.0)
    assert bits == pytest.approx(4.0, rel=0.2)
    errors = [float((weights[n].float() - change.expert[n].float()).norm()) for n in weights]
    changes = [float(d.norm()) for d in change.differences.values()]
    assert sum(errors) < 0.7 * sum(changes)
