import copy
import math

import pico
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mergekit_mediator.errors import PromptError, TaskError
from mergekit_mediator.evaluate.scorer import render, score, score_answers
from mergekit_mediator.evaluate.tasks import Example

WORDS = ["</s>", "<user>", "<model>", *(f"w{i}" for i in range(29))]
TEMPLATE = (
    "{% for m in messages %}<user> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


PROMPTS = [" ".join(f"w{(i * k) % 29}" for k in range(1, 2 + i % 5)) for i in range(1, 25)]


def decoded(model, tokenizer, prompt, length):
    ids = torch.tensor([render(tokenizer, prompt)])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=length, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


def generated_examples(model, tokenizer):
    """Half of the answers are what the model writes, half differ in the last word."""
    examples = []
    for i, prompt in enumerate(PROMPTS):
        ids = decoded(model, tokenizer, prompt, 3)
        ids = ids[: ids.index(0)] if 0 in ids else ids
        words = [WORDS[j] for j in ids] or ["w5"]
        if i % 2:
            words[-1] = "w1" if words[-1] != "w1" else "w2"
        examples.append(Example(prompt, " ".join(words)))
    return examples


def greedy_accuracy(model, tokenizer, examples):
    right = 0
    for example in examples:
        want = [*tokenizer(example.answer).input_ids, 0]
        right += decoded(model, tokenizer, example.prompt, len(want)) == want
    return right / len(examples)


def test_exact_match_is_that_of_greedy_decoding(model, tokenizer):
    # an end of sequence that is likely, so that answers also end
    likely_end = copy.deepcopy(model)
    with torch.no_grad():
        likely_end.lm_head.weight[0] *= 1.7
    examples = generated_examples(likely_end, tokenizer)
    want = greedy_accuracy(likely_end, tokenizer, examples)
    assert 0 < want < 1
    assert score(likely_end, tokenizer, examples).accuracy == want


def test_log_likelihood_is_the_mean_over_answer_tokens(model, tokenizer):
    examples = [Example("w3 w4", "w5 w6"), Example("w7", "w8")]
    total = 0.0
    for example in examples:
        prompt = render(tokenizer, example.prompt)
        answer = [*tokenizer(example.answer).input_ids, 0]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        total += sum(float(logits[len(prompt) - 1 + i, t]) for i, t in enumerate(answer))
    got = score(model, tokenizer, examples)
    assert got.answer_log_likelihood == pytest.approx(total / 5, abs=1e-5)
    assert got.n == 2


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_a_score_does_not_depend_on_batches_and_padding(model, tokenizer, batch_size):
    examples = generated_examples(model, tokenizer)
    one, many = score(model, tokenizer, examples, 1), score(model, tokenizer, examples, batch_size)
    assert many.accuracy == one.accuracy
    assert many.answer_log_likelihood == pytest.approx(one.answer_log_likelihood, abs=1e-5)


def test_answers_are_scored_in_the_order_of_the_examples(model, tokenizer):
    examples = generated_examples(model, tokenizer)
    got = score_answers(model, tokenizer, examples, 4)
    assert [a.tokens for a in got] == [len(e.answer.split()) + 1 for e in examples]
    alone = [score(model, tokenizer, [example]) for example in examples]
    assert [a.right for a in got] == [s.accuracy == 1 for s in alone]


def test_a_model_that_cannot_keep_few_logits_scores_the_same(model, tokenizer):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, attention_mask, use_cache):
            return self.inner(input_ids, attention_mask=attention_mask, use_cache=use_cache)

    examples = generated_examples(model, tokenizer)
    got, want = score(Plain(), tokenizer, examples), score(model, tokenizer, examples)
    assert got.accuracy == want.accuracy
    assert got.answer_log_likelihood == pytest.approx(want.answer_log_likelihood, abs=1e-6)


@pytest.mark.parametrize("architecture", sorted(pico.ARCHITECTURES))
def test_a_shared_prefix_of_prompts_is_read_once_and_changes_no_score(architecture):
    torch.manual_seed(3)
    model, words = pico.ARCHITECTURES[architecture]().eval(), pico.tokenizer()
    beginning = " ".join(f"w{i}" for i in range(20))
    ends = ["w1", "w2 w3 w4", "w5 w6", "w1 w9"]
    examples = [Example(f"{beginning} {end}", f"w{i} w7") for i, end in enumerate(ends)]
    read = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    got = score_answers(model, words, examples)
    with_beginning = sum(read)
    read.clear()
    want = [score_answers(model, words, [example])[0] for example in examples]
    assert with_beginning < sum(read) / 2
    for one, alone in zip(got, want, strict=True):
        assert one.log_likelihood == pytest.approx(alone.log_likelihood, abs=1e-4)


def test_an_untrained_uniform_model_has_the_entropy_of_the_vocabulary(model, tokenizer):
    uniform = copy.deepcopy(model)
    with torch.no_grad():
        uniform.lm_head.weight.zero_()
    got = score(uniform, tokenizer, [Example("w3", "w4 w5")])
    assert got.answer_log_likelihood == pytest.approx(-math.log(len(WORDS)), abs=1e-6)


def test_prompts_go_through_the_chat_template(tokenizer):
    want = tokenizer("<user> w3 w4 <model>").input_ids
    assert render(tokenizer, "w3 w4") == want
    assert render(tokenizer, ({"role": "user", "content": "w3 w4"},)) == want


def test_without_a_template_a_prompt_is_plain_text(tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    assert render(plain, "w3 w4") == plain("w3 w4").input_ids
    turn = {"role": "user", "content": "w3"}
    assert render(plain, (turn,)) == plain("w3").input_ids
    with pytest.raises(PromptError, match="2 messages needs a tokenizer with a chat template"):
        render(plain, (turn, turn))


def test_a_score_of_no_examples_is_refused(model, tokenizer):
    with pytest.raises(TaskError, match="at least one example, got none"):
        score(model, tokenizer, [])


def test_a_tokenizer_without_an_end_is_refused(model, tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(TaskError, match="no end-of-sequence token"):
        score(model, endless, [Example("w1", "w2")])
