"""A model reads the common first tokens of prompts once, for gradients too."""

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


def count_tokens(model):
    """A list that grows by the number of tokens of every later call of the model."""
    counts = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return counts


@pytest.mark.parametrize("at_once", [512, 64])
def test_gradients_are_those_of_whole_prompts_from_fewer_tokens(model, monkeypatch, at_once):
    answers = answer(model, PROMPTS, pad=0, answer_tokens=6)
    # otherwise the model is its own teacher, and all gradients are 0
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    counts = count_tokens(model)
    got, tokens = gradients(model, answers, tokens_at_once=at_once), sum(counts)
    counts.clear()
    monkeypatch.setattr(distil, "read_prefix", lambda *_: None)
    want = gradients(model, answers, tokens_at_once=at_once)
    assert tokens < sum(counts) / 2
    for name, gradient in want.items():
        if gradient is None:
            assert got[name] is None
        else:
            assert gradient.any(), name
            torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_gradients_of_weights_come_before_those_of_the_prefix():
    """The gradient of a weight does not wait for the part of the prefix while others are computed."""
    model = pico.llama().eval().requires_grad_(True)
    prefix = read_prefix(model, PROMPTS)
    logits = model(input_ids=torch.tensor([[5], [6]]), **prefix.inputs(2)).logits
    logits.square().sum().backward()
    first = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    prefix.backward()
    assert not model.model.layers[0].mlp.up_proj.weight.grad.equal(first)


def test_there_is_no_prefix_of_one_prompt_or_of_prompts_that_share_no_token(model):
    assert read_prefix(model, [[4, 5], [5, 5]]) is None
    assert read_prefix(model, PROMPTS[:1]) is None


def test_a_cache_that_gradients_do_not_pass_is_used_only_without_gradients():
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
