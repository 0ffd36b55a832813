"""Requests: rows with mixtures of their own, what generation offers, and what is refused."""

import copy
import pickle
import threading

import pico
import pytest
import torch
from routed_pico import GREEDY, MIXTURES, build
from transformers.generation import BaseStreamer, StoppingCriteria

from mergekit_mediator import MediatorModel
from mergekit_mediator.errors import MixtureError, RoutingError


def by_hand(model, row, mask, mixture, **kwargs):
    """One row alone, by the model's own generate inside a mixture."""
    ids = row[mask.bool()][None]
    with torch.no_grad(), model.mixture(mixture) as mixed:
        return mixed.generate(ids, **{**GREEDY, **kwargs})[:, ids.shape[1] :]


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3"])
@pytest.mark.parametrize("values", ["exact", "int4", "random_sign"])
def test_rows_and_merge_give_the_same_logits_to_round_off(family, values, make, tmp_path, batch):
    written = make(make=pico.ARCHITECTURES[family], dtype=torch.float32)
    model = build(tmp_path / "out", written, density=0.3, values=values)
    rows = model.forward(*batch, mixture=MIXTURES, apply="rows").logits
    merged = model.forward(*batch, mixture=MIXTURES, apply="merge").logits
    dense = model.forward(*batch, mixture="dense").logits
    torch.testing.assert_close(rows, merged, rtol=1e-4, atol=1e-5)
    assert float((rows - dense)[[0, 1, 2, 4], -1].abs().amax(dim=-1).min()) > 0.1
    assert torch.equal(model.forward(*batch, mixture=MIXTURES).logits, rows)


def test_rows_and_merge_agree_in_bfloat16(make, tmp_path, batch):
    model = build(tmp_path / "out", make(), density=0.3)
    rows = model.forward(*batch, mixture=MIXTURES, apply="rows").logits
    merged = model.forward(*batch, mixture=MIXTURES, apply="merge").logits
    torch.testing.assert_close(rows, merged, rtol=2**-5, atol=2**-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"use_cache": False}],
    ids=str,
)
@pytest.mark.parametrize("apply", ["rows", "merge"])
def test_every_row_is_answered_as_if_it_were_alone(model, batch, apply, options):
    ids, mask = batch
    output = model.generate(ids, mask, mixture=MIXTURES, apply=apply, **GREEDY, **options)
    returned = options.get("num_return_sequences", 1)
    assert len(output) == 5 * returned
    for row, mixture in enumerate(MIXTURES):
        alone = by_hand(model, ids[row], mask[row], mixture, **options)
        own = output[row * returned : (row + 1) * returned, ids.shape[1] :]
        assert torch.equal(own[:, : alone.shape[1]], alone)


def test_sampling_with_a_seed_draws_the_same_in_both_forms(model, batch):
    drawn = []
    for apply in ("rows", "merge"):
        torch.manual_seed(3)
        options = {"do_sample": True, "max_new_tokens": 6, "num_return_sequences": 2}
        drawn.append(model.generate(*batch, mixture="math", apply=apply, **options))
    assert torch.equal(*drawn)


def test_rows_leave_no_trace_in_the_model(model, batch):
    before = {n: w.clone() for n, w in model.model.state_dict().items()}
    with pytest.raises(IndexError):
        model.forward(batch[0] + 1000, mixture=MIXTURES, apply="rows")
    model.forward(*batch, mixture=MIXTURES, apply="rows")
    after = model.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())


def test_layers_that_cannot_have_rows_are_run_mixture_by_mixture(make, tmp_path, batch):
    model = build(tmp_path / "out", make(make=pico.gpt2), density=0.3)
    with pytest.raises(
        MixtureError, match=r"apply='rows' cannot serve .* in .*: use apply='merge'"
    ):
        model.forward(*batch, mixture=MIXTURES, apply="rows")
    together = model.forward(*batch, mixture=MIXTURES, labels=batch[0])
    alone = model.forward(batch[0][1:2], batch[1][1:2], mixture="code")
    torch.testing.assert_close(together.logits[1:2], alone.logits)
    assert together.loss.isfinite()


def test_generate_routes_each_row_by_its_own_prompt(model, batch):
    ids, mask = batch
    decision = model.route(ids, mask)
    output = model.generate(ids, mask, **GREEDY)
    for row, weights in enumerate(model.mixtures(decision).tolist()):
        mixture = dict(zip(model.experts, weights, strict=True))
        alone = by_hand(model, ids[row], mask[row], mixture)
        assert torch.equal(output[row, 9 : 9 + alone.shape[1]], alone[0])


def test_a_row_can_be_named_and_its_neighbour_routed(model, batch):
    ids, mask = batch
    routed = model.forward(ids, mask).logits
    output = model.forward(ids, mask, mixture=[None, "dense", None, None, None]).logits
    dense = model.forward(ids, mask, mixture="dense").logits
    torch.testing.assert_close(output[0], routed[0])
    torch.testing.assert_close(output[1], dense[1])


def test_a_threshold_of_entropy_blends_the_experts(model, batch):
    model.entropy_threshold = 0.0
    assert torch.equal(model.mixtures(model.route(*batch)), model.route(*batch).weights)


# What generation offers


class Streamed(BaseStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_tokens_are_streamed(model, batch):
    streamer = Streamed()
    output = model.generate(batch[0][:1], streamer=streamer, mixture="code", **GREEDY)
    assert streamer.tokens == output[0].tolist()
    assert streamer.ended


def test_stopping_criteria_stop_every_row(model, batch):
    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 11)

    for apply in ("rows", "merge"):
        options = {"stopping_criteria": [After()], "apply": apply, **GREEDY}
        assert model.generate(*batch, mixture=MIXTURES, **options).shape == (5, 11)


def test_assisted_decoding_writes_what_the_mixture_would(model, batch):
    assistant = copy.deepcopy(pico.llama()).eval()
    ids = batch[0][:1]
    expected = model.generate(ids, mixture="math", **GREEDY)
    for option in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 2}):
        assert torch.equal(model.generate(ids, mixture="math", **option, **GREEDY), expected)


def test_requests_of_several_threads_queue(model, batch):
    ids, mask = batch
    expected = [model.generate(ids, mask, mixture=m, **GREEDY) for m in MIXTURES[:3]]
    results = {}

    def request(index):
        for _ in range(5):
            output = model.generate(ids, mask, mixture=MIXTURES[index], **GREEDY)
            results.setdefault(index, []).append(torch.equal(output, expected[index]))

    threads = [threading.Thread(target=request, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {0: [True] * 5, 1: [True] * 5, 2: [True] * 5}


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixture": "law"}, "unknown expert 'law'; this model has math, code, chat"),
        ({"mixture": ["math"]}, "one for each of 5 rows is required, got 1 mixtures"),
        ({"mixture": {"math": -1}}, "finite and at least 0"),
        ({"mixture": {"math": 0}}, "one weight above 0"),
        ({"apply": "both"}, "apply must be one of auto, merge, rows, got 'both'"),
        ({"streamer": Streamed()}, "streamer: a batch of one row is required, got 5 rows"),
        ({"cache_implementation": "paged"}, "bypasses generate"),
        ({"mixture": 3}, "an expert's name or weights by expert are required, got 3"),
        ({"mixture": [0.2] * 5}, "an expert's name or weights by expert are required, got 0.2"),
        ({"past_key_values": ((1, 2),)}, "one of transformers' caches is required, got tuple"),
    ],
)
def test_generation_that_cannot_be_done_is_refused(model, batch, arguments, message):
    with pytest.raises(MixtureError, match=message):
        model.generate(*batch, **arguments, **GREEDY)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", "an empty prompt cannot be routed"),
        ([], "at least one prompt is required, got none"),
        (torch.zeros(0, 4, dtype=torch.long), r"shape \[batch, length\] is required, got \[0, 4\]"),
        (
            torch.ones(1, 65, dtype=torch.long),
            "65 tokens: this model takes at most 64 tokens: shorten the prompt",
        ),
        (None, "input_ids are required, got none"),
        ([[5, 6], [7]], "a tensor of token ids"),
    ],
)
def test_prompts_that_cannot_be_routed_are_refused(model, prompts, message):
    with pytest.raises(RoutingError, match=message):
        model.route(prompts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"route_on": "topic"}, "one of prompt, last_user"), ({"router": "oracle"}, "unknown router")],
)
def test_routing_that_does_not_exist_is_refused(model, batch, arguments, message):
    with pytest.raises(RoutingError, match=message):
        model.route(*batch, **arguments)


def test_inside_a_mixture_nothing_is_routed_or_named(model, batch):
    with model.mixture({"math": 1.0}):
        for call in (
            lambda: model.route(*batch),
            lambda: model.generate(*batch, mixture="code", **GREEDY),
            lambda: model.forward(*batch, mixture="code"),
            lambda: model.mixture({"code": 1.0}).__enter__(),
        ):
            with pytest.raises(MixtureError, match="is in place"):
                call()


def test_continuous_batching_and_training_are_refused(model, batch):
    with pytest.raises(MixtureError, match="continuous batching bypasses generate"):
        model.model.generate_batch([[5, 6]])
    model.model.train()
    try:
        with pytest.raises(MixtureError, match="cannot be trained"):
            model.forward(*batch)
    finally:
        model.model.eval()


def test_a_quantised_model_is_refused_with_the_reason(loaded):
    from transformers import AutoModelForCausalLM

    quantised = AutoModelForCausalLM.from_pretrained(loaded.root)
    weight = quantised.model.layers[0].mlp.up_proj
    weight.weight = torch.nn.Parameter(weight.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(MixtureError, match="load the model without quantization"):
        MediatorModel.attach(quantised, loaded.root)


def test_lists_of_ids_are_refused_by_forward_too(model):
    with pytest.raises(RoutingError, match=r"a tensor \[batch, length\] is required, got list"):
        model.forward([[5, 6]])


def test_an_experts_name_is_a_mixture_too(model, batch):
    with torch.no_grad(), model.mixture("code") as mixed:
        named = mixed(*batch).logits
    torch.testing.assert_close(named, model.forward(*batch, mixture="code", apply="merge").logits)


@pytest.mark.parametrize("copier", [copy.deepcopy, pickle.dumps], ids=["copied", "pickled"])
def test_a_routed_model_is_not_copied_or_pickled(model, copier):
    with pytest.raises(MixtureError, match="cannot be copied or pickled: load the artifact again"):
        copier(model.model)


def test_a_compiled_model_is_routed_all_the_same(model, batch):
    compiled = torch.compile(model.model, backend="eager")
    for mixture in ("math", "code", MIXTURES):
        expected = model.forward(*batch, mixture=mixture).logits
        assert torch.equal(compiled(*batch, mixture=mixture).logits, expected)


@pytest.mark.parametrize("apply", ["rows", "merge"])
def test_an_adapter_of_peft_may_be_added_on_top(model, batch, apply):
    import peft

    routed = MediatorModel.from_pretrained(model.root)
    expected = routed.generate(*batch, mixture=MIXTURES, apply=apply, **GREEDY)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(routed.model, config)
    ids, mask = batch
    options = {"input_ids": ids, "attention_mask": mask, "mixture": MIXTURES, "apply": apply}
    assert torch.equal(wrapped.generate(**options, **GREEDY), expected)  # as new, it adds nothing
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(generator=torch.Generator().manual_seed(0))
    assert not torch.equal(wrapped.generate(**options, **GREEDY), expected)
