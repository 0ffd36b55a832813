"""Requests that go on: which part of a chat is routed by, and caches that know their mixture."""

import copy
import inspect

import pico
import pytest
import torch
from routed_pico import GREEDY, MIXTURES
from transformers import DynamicCache, LlamaForCausalLM

from mergekit_mediator.errors import MixtureError, RoutingError
from mergekit_mediator.serve import caches
from mergekit_mediator.serve.mixture import Mixture

# The names that this version of transformers takes for a cache.
TAKEN = inspect.signature(LlamaForCausalLM.forward).parameters
CACHE_NAMES = [name for name in caches.NAMES if name in TAKEN or name == "past_key_values"]


def test_a_request_keeps_its_mixture_to_the_end(model, batch):
    ids = batch[0][:1]
    first = model.forward(ids, mixture="code", use_cache=True)
    token = first.logits[:, -1:].argmax(-1)
    second = model.forward(token, past_key_values=first.past_key_values)
    whole = model.forward(torch.cat([ids, token], dim=1), mixture="code")
    torch.testing.assert_close(second.logits[:, -1], whole.logits[:, -1])


def test_rows_keep_their_mixtures_with_their_cache(model, batch):
    ids, mask = batch[0], torch.ones_like(batch[1])
    first = model.forward(ids, mask, mixture=MIXTURES, use_cache=True)
    token = first.logits[:, -1:].argmax(-1)
    second = model.forward(token, past_key_values=first.past_key_values)
    whole = model.forward(torch.cat([ids, token], dim=1), mixture=MIXTURES)
    torch.testing.assert_close(second.logits[:, -1], whole.logits[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("copied", [False, True], ids=["itself", "a copy"])
def test_a_cache_of_another_mixture_is_refused(model, batch, copied, name):
    cache = caches.in_output(model.forward(batch[0][:1], mixture="code", use_cache=True))
    cache = copy.deepcopy(cache) if copied else cache
    message = "computed with 1 code and cannot be used with 1 math"
    with pytest.raises(MixtureError, match=message):
        model.forward(batch[0][:1, :1], **{name: cache}, mixture="math")
    with pytest.raises(MixtureError, match=message):
        model.generate(batch[0][:1], **{name: cache}, mixture="math", **GREEDY)
    with model.mixture({"math": 1.0}) as mixed, pytest.raises(MixtureError, match=message):
        mixed(batch[0][:1, :1], **{name: cache})


def test_a_cache_that_the_model_did_not_fill_is_refused(model, batch):
    cache = DynamicCache(config=model.model.config)
    cache.update(torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 8), 0)
    with pytest.raises(
        MixtureError, match="its mixture is unknown: fill the cache with this model"
    ):
        model.forward(batch[0][:1], past_key_values=cache)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_chat_that_goes_on_with_its_cache_keeps_its_mixture(model, batch, name):
    ids = batch[0][:1]
    cache = DynamicCache(config=model.model.config)
    first = model.generate(ids, **{name: cache}, mixture="chat", **GREEDY)
    longer = torch.cat([first, batch[0][1:2]], dim=1)
    second = model.generate(longer, **{name: cache}, **GREEDY)
    assert torch.equal(second, model.generate(longer, mixture="chat", **GREEDY))


def test_digests_tell_mixtures_apart_and_nothing_else(model):
    digests = [model.mixture_digest(m) for m in ("math", "code", "dense", {"math": 0.5}, MIXTURES)]
    assert len(set(digests)) == 5
    assert all(len(digest) == 32 for digest in digests)
    assert model.mixture_digest({"math": 1, "code": 0}) == digests[0]
    assert model.mixture_digest({"chat": 1, "math": 2}) == model.mixture_digest(
        {"math": 2, "chat": 1}
    )


def chat(*turns):
    template = [
        {"role": r, "content": t}
        for r, t in zip(("user", "assistant", "user"), turns, strict=False)
    ]
    ids = pico.tokenizer().apply_chat_template(template, add_generation_prompt=True)["input_ids"]
    return torch.tensor([ids])


def test_the_last_user_turn_alone_can_be_routed_by(model):
    long = chat("w1 w2 w3", "w9 w8", "w20 w21")
    alone = chat("w20 w21")
    counted = model._contexts.counted(long, torch.ones_like(long), "last_user")
    expected = model._contexts.counted(alone, torch.ones_like(alone), "last_user")
    assert long[counted].tolist() == alone[expected].tolist()
    assert model._contexts.counted(long, torch.ones_like(long), "prompt").sum() > counted.sum()
    whole, last = (model.route(long, route_on=on).weights for on in ("prompt", "last_user"))
    assert not torch.equal(whole, last)


def test_an_answer_in_the_row_is_not_context(model):
    prompt, answer = chat("w20 w21 w22"), torch.tensor([[40, 41, 42, 2]])
    row = torch.cat([prompt, answer], dim=1)
    context = model._contexts.before_answer(row, torch.ones_like(row))
    assert context.tolist() == [[1] * prompt.shape[1] + [0] * 4]
    labels = row.clone()
    labels[:, :2] = -100
    assert model._contexts.before_answer(row, torch.ones_like(row), labels).sum() == 2


def test_padding_without_a_mask_is_not_context(model, batch):
    ids = batch[0][:1]
    padded = torch.cat([ids, torch.zeros(1, 7, dtype=torch.long)], dim=1)
    expected = model.forward(ids).logits
    torch.testing.assert_close(model.forward(padded).logits[:, : ids.shape[1]], expected)


def test_a_fallback_answers_what_cannot_be_routed(model, batch):
    ids, mask = batch[0][:2], torch.ones(2, 9, dtype=torch.long)
    mask[1] = 0
    with pytest.raises(RoutingError, match="an empty prompt cannot be routed"):
        model.forward(ids, mask)
    model.fallback = "chat"
    rows = model._choice.mixtures(ids, mask, None, None, None)
    assert rows[1] == Mixture((("chat", 1.0),))


@pytest.mark.parametrize(
    ("action", "fallback", "mixture"),
    [("dense", None, [0, 0, 0]), ("fallback", "chat", [0, 0, 1]), ("fallback", "dense", [0, 0, 0])],
)
def test_requests_out_of_distribution_get_the_action_of_the_settings(
    model, batch, action, fallback, mixture
):
    model.ood_threshold, model.ood_action, model.fallback = -1e9, action, fallback
    assert model.mixtures(model.route(*batch)).tolist() == [mixture] * 5


def test_requests_out_of_distribution_are_refused_by_the_action_refuse(model, batch):
    model.ood_threshold, model.ood_action = -1e9, "refuse"
    with pytest.raises(RoutingError, match="request 0 is out of distribution"):
        model.generate(*batch, max_new_tokens=1)


def test_an_action_without_a_threshold_that_triggers_it_is_refused(model, batch):
    model.ood_action = "refuse"
    with pytest.raises(
        RoutingError, match=r"'refuse' needs a threshold .* `mergekit-mediator calibrate`"
    ):
        model.mixtures(model.route(*batch))
