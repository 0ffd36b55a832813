"""Experts write the texts that nobody has for them."""

import copy

import pico
import pytest
import torch

from mergekit_mediator.errors import PromptError
from mergekit_mediator.tune.written import first_token, user_turn, write

COUNT = 12


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return pico.llama().eval()


def begun(texts, start):
    return sum(text.prompt[: len(start)] == start for text in texts)


def test_half_of_the_texts_are_requests_in_the_template(model):
    tokenizer = pico.tokenizer()
    start, _ = user_turn(tokenizer)
    texts = write(model, tokenizer, COUNT)
    assert len(texts) == COUNT
    requests = [text for text in texts if text.prompt != [1]]
    assert 0 < len(requests) <= COUNT // 2
    assert begun(requests, start) == len(requests)
    assert all(len(text.prompt) > len(start) for text in requests)
    assert all(text.answer for text in texts)
    assert all(text.logs.shape == text.likely.shape for text in texts)


def test_texts_begin_with_nothing_where_there_is_no_template(model):
    tokenizer = pico.tokenizer()
    tokenizer.chat_template = None
    assert user_turn(tokenizer) is None
    assert all(text.prompt == [1] for text in write(model, tokenizer, COUNT))


def test_texts_are_drawn_and_equal_each_time(model):
    tokenizer = pico.tokenizer()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = write(model, tokenizer, COUNT)
    assert torch.equal(torch.rand(3), expected)  # the generator of the program is as it was
    second = write(model, tokenizer, COUNT)
    assert [text.answer for text in first] == [text.answer for text in second]
    assert len({tuple(text.answer) for text in first}) > COUNT // 2


def test_texts_follow_the_probabilities_of_the_expert(model):
    texts = write(model, pico.tokenizer(), 64)
    nothing = [text for text in texts if text.prompt == [1]]
    with torch.no_grad():
        logs = model(torch.tensor([[1]])).logits[0, -1].log_softmax(-1)
    mean = sum(float(logs[text.answer[0]]) for text in nothing) / len(nothing)
    entropy = -float((logs.exp() * logs).sum())
    assert mean == pytest.approx(
        -entropy, abs=0.3
    )  # the likeliest token alone would be far above it


def test_settings_of_the_model_do_not_change_what_is_drawn(model):
    plain = [text.answer for text in write(model, pico.tokenizer(), COUNT)]
    own = copy.deepcopy(model)
    own.generation_config.update(do_sample=True, temperature=0.1, top_k=1, repetition_penalty=9.0)
    assert [text.answer for text in write(own, pico.tokenizer(), COUNT)] == plain


def test_each_batch_is_told(model):
    steps = []
    write(model, pico.tokenizer(), COUNT, steps.append)
    assert sum(steps) == COUNT


def test_the_first_token_is_the_one_that_ends_texts_where_none_begins_them():
    tokenizer = pico.tokenizer()
    tokenizer.bos_token = None
    assert first_token(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(PromptError, match="give a file of prompts"):
        first_token(tokenizer)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}", "[/INST]"),
        ("{% for m in messages %}w1 {{ m.content }}{% endfor %}", ""),
    ],
)
def test_the_end_of_a_turn_is_what_the_template_writes_after_it(template, end):
    tokenizer = pico.tokenizer()
    tokenizer.chat_template = template
    start, found = user_turn(tokenizer)
    assert (len(start), found) == (1, end)


def test_a_template_that_changes_the_text_is_not_used(model):
    tokenizer = pico.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    assert user_turn(tokenizer) is None
