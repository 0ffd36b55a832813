"""What prompts begin with is read once, for gradients too."""

import pico
import pytest
import torch

from mergekit_mediator.models.prefix import read_prefix
from mergekit_mediator.tune import fit as distil
from mergekit_mediator.tune.teacher import answer

BEGINNING = [4 + i for i in range(20)]  # longer than the sliding window of Gemma
PROMPTS = [[*BEGINNING, *end] for end in ([5], [6, 7, 8], [9, 10], [5, 13], [5, 13, 14])]


@pytest.fixture(params=sorted(pico.ARCHITECTURES))
def model(request):
    torch.manual_seed(3)
    return pico.ARCHITECTURES[request.param]().eval()


def gradients(model, answers, **options):
    model.requires_grad_(True)
    model.zero_grad()
    distil._backward(model, answers, **options)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def watched(model):
    """The tokens of every call of the model from now on."""
    read = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return read


@pytest.mark.parametrize("at_once", [512, 64])
def test_gradients_are_those_of_whole_prompts_from_fewer_tokens(model, monkeypatch, at_once):
    answers = answer(model, PROMPTS, pad=0, answer_tokens=6)
    # else the model is its own teacher, and all gradients are 0
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    read = watched(model)
    got, tokens = gradients(model, answers, tokens_at_once=at_once), sum(read)
    read.clear()
    monkeypatch.setattr(distil, "read_prefix", lambda *_: None)
    want = gradients(model, answers, tokens_at_once=at_once)
    assert tokens < sum(read) / 2
    for name, gradient in want.items():
        if gradient is None:
            assert got[name] is None
        else:
            assert gradient.any(), name
            torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_gradients_of_weights_come_before_those_of_the_beginning():
    """So that no weight's gradient waits for its second part while others are made."""
    model = pico.llama().eval().requires_grad_(True)
    prefix = read_prefix(model, PROMPTS)
    logits = model(input_ids=torch.tensor([[5], [6]]), **prefix.inputs(2)).logits
    logits.square().sum().backward()
    first = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    prefix.backward()
    assert not model.model.layers[0].mlp.up_proj.weight.grad.equal(first)


def test_nothing_is_read_where_prompts_share_nothing_or_are_one(model):
    assert read_prefix(model, [[4, 5], [5, 5]]) is None
    assert read_prefix(model, PROMPTS[:1]) is None


def test_a_cache_that_gradients_do_not_pass_is_left_alone_only_when_they_are_wanted():
    class Static:
        layers = (object(),)

        def get_seq_length(self):
            return 20

        def batch_repeat_interleave(self, repeats):
            self.repeats = repeats

    class Model(torch.nn.Linear):
        def forward(self, input_ids, past_key_values=None, use_cache=True):
            return type("Output", (), {"past_key_values": Static()})

    model = Model(1, 1)
    assert read_prefix(model, PROMPTS) is None
    with torch.no_grad():
        prefix = read_prefix(model, PROMPTS)
    assert prefix.length == 20
    assert prefix.inputs(3)["past_key_values"].repeats == 3
