"""Which form a batch is run in, and that the answer does not depend on it."""

import pytest
import torch
from adapters import train
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from transformers import DynamicCache
from transformers.generation import StoppingCriteria

from mergekit_mediator import MediatorModel
from mergekit_mediator.delta.factors import Factors
from mergekit_mediator.delta.mixing import mix_, restore_
from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.errors import RoutingError
from mergekit_mediator.merge.run import run
from mergekit_mediator.serve.mixture import DENSE, Mixture

GREEDY = {"max_new_tokens": 5, "do_sample": False}
A, B = Mixture((("a", 1.0),)), Mixture((("b", 1.0),))


def load(out, config):
    run(MergeConfiguration.model_validate(config), str(out), MergeOptions(quiet=True))
    return MediatorModel.from_pretrained(out)


@pytest.fixture(scope="module")
def factored(make, tmp_path_factory):
    """Two adapters, stored as their own factors, in float32."""
    root, base = tmp_path_factory.mktemp("factored"), make(dtype=torch.float32).base
    for seed, name in enumerate("ab"):
        train(base, root / name, seed, target_modules="all-linear", r=4)
    models = [
        {"model": f"{base}+{root / name}", "parameters": {"expert": name}} for name in ("a", "b")
    ]
    config = {"merge_method": "mediator", "base_model": str(base), "models": models}
    return load(root / "out", {**config, "parameters": {"route": "all"}, "dtype": "float32"})


@pytest.fixture(scope="module")
def sparse(make, tmp_path_factory):
    config = make(dtype=torch.float32, experts=("a", "b")).config(route="all", density=0.3)
    return load(tmp_path_factory.mktemp("sparse") / "out", config)


@pytest.fixture
def ids():
    return torch.randint(4, 60, (2, 7), generator=torch.Generator().manual_seed(1))


def form(model, rows, apply="auto", length=4, steps=0):
    return model._serving._form(rows, apply, None, length, steps)


def test_factors_are_applied_in_rows_while_few_tokens_are_computed(factored):
    assert form(factored, (A,)) == "rows"
    assert form(factored, (A,) * 3, length=20) == "merge"
    assert form(factored, (A,), steps=100) == "merge"
    assert form(factored, (Mixture((("a", 0.5), ("b", 0.5))),)) == "rows"
    assert form(factored, (A,), "merge") == "merge"
    assert form(factored, (A,), "rows", steps=10_000) == "rows"


def test_sparse_experts_and_the_dense_expert_are_put_in_place(sparse, factored):
    assert form(sparse, (A,)) == "merge"
    assert form(sparse, (A, A)) == "merge"
    assert form(factored, (DENSE,)) == "merge"


def test_rows_that_differ_are_run_together_or_parted(sparse):
    assert form(sparse, (A, B), steps=10_000) == "rows"
    assert form(sparse, (A, B), "merge") == "parted"


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_new_tokens": 9}, 9),
        ({"max_length": 30}, 23),
        ({}, 20),
    ],
)
def test_the_tokens_to_come_are_taken_from_what_limits_them(sparse, options, steps):
    assert sparse._serving._steps(7, options) == steps


def test_both_forms_of_factors_give_the_same_answer(factored, ids):
    for mixture in ("a", {"a": 0.3, "b": 0.9}, ["a", "b"]):
        rows, merged = (
            factored.forward(ids, mixture=mixture, apply=apply).logits
            for apply in ("rows", "merge")
        )
        torch.testing.assert_close(rows, merged, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(rows, factored.forward(ids, mixture="dense").logits, atol=1e-2)
        generated = [
            factored.generate(ids, mixture=mixture, apply=apply, num_beams=2, **GREEDY)
            for apply in ("rows", "merge")
        ]
        assert torch.equal(*generated)


def test_factors_in_a_bfloat16_weight_are_rounded_once_but_for_their_own_rounding():
    torch.manual_seed(0)
    dense, stored = torch.randn(48, 32).bfloat16(), []
    exact = dense.double()
    for p in (0.3, 1.2):
        factors = Factors(torch.randn(48, 3) / 9, torch.randn(32, 3) / 9, torch.ones(3))
        stored.append((p, StoredWeight.of_factors((48, 32), torch.bfloat16, factors)))
        exact += p * factors.product().double()
    weight = dense.clone()
    saved = mix_(weight, stored)
    step = 2**-8 * exact.abs().max()
    assert float((weight.double() - exact).abs().max()) < 0.75 * step
    restore_(weight, saved)
    assert torch.equal(weight, dense)


def test_a_chat_may_go_on_in_another_form_with_its_cache(factored, ids, monkeypatch):
    expected = factored.generate(ids, mixture="a", apply="merge", **GREEDY)
    cache = DynamicCache(config=factored.model.config)
    first = factored.forward(ids[:, :3], mixture="a", past_key_values=cache, apply="rows")
    assert first.past_key_values is cache
    assert torch.equal(factored.generate(ids, past_key_values=cache, **GREEDY), expected)
    monkeypatch.setattr(factored._serving.rows, "entering_cost", 10_000)  # auto takes rows
    cache = DynamicCache(config=factored.model.config)
    factored.forward(ids[:, :3], mixture="a", past_key_values=cache, apply="merge")
    assert torch.equal(factored.generate(ids, past_key_values=cache, **GREEDY), expected)


def test_sampled_rows_are_drawn_from_their_own_mixtures(sparse, ids):
    """The draws of a batch, against those from the distributions of each row alone."""
    torch.manual_seed(5)
    options = {"do_sample": True, "temperature": 1.3, "top_k": 0, "max_new_tokens": 4}
    drawn = sparse.generate(ids, mixture=["a", "b"], apply="rows", eos_token_id=None, **options)
    torch.manual_seed(5)
    told = ids
    for _ in range(4):
        alone = [
            sparse.forward(told[row : row + 1], mixture=name).logits[:, -1]
            for row, name in enumerate("ab")
        ]
        probabilities = (torch.cat(alone).float() / 1.3).softmax(dim=-1)
        told = torch.cat([told, torch.multinomial(probabilities, 1)], dim=1)
    assert torch.equal(drawn, told)


def test_static_caches_are_filled_anew_for_each_request(sparse, ids):
    for mixture in ("a", "b", ["a", "b"]):
        expected = sparse.generate(ids, mixture=mixture, **GREEDY)
        static = sparse.generate(ids, mixture=mixture, cache_implementation="static", **GREEDY)
        assert torch.equal(static, expected)


@pytest.mark.parametrize("apply", ["rows", "merge"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupt_in_generation_leaves_the_dense_expert(sparse, ids, apply, error):
    class Interrupting(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            raise error

    before = {name: weight.clone() for name, weight in sparse.model.state_dict().items()}
    with pytest.raises(error):
        sparse.generate(ids, mixture="a", apply=apply, stopping_criteria=[Interrupting()], **GREEDY)
    after = sparse.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not sparse._mixer.inside
    sparse.generate(ids, mixture="b", apply=apply, **GREEDY)


def test_every_call_refuses_a_batch_of_no_rows(sparse):
    ids = torch.zeros(0, 4, dtype=torch.long)
    for call in (sparse.generate, sparse.forward, sparse.route):
        with pytest.raises(RoutingError, match=r"is required, got \[0, 4\]"):
            call(ids)


def test_every_call_refuses_a_prompt_longer_than_the_context(sparse):
    ids = torch.full((1, 65), 5)
    for call in (sparse.generate, sparse.forward, sparse.route):
        with pytest.raises(RoutingError, match="takes at most 64 tokens: shorten the prompt"):
            call(ids)


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 8, 9])
@pytest.mark.parametrize("length", [1, 5])
def test_batches_of_any_size_are_answered_as_with_the_mixture_in_place(sparse, rows, length):
    ids = torch.randint(4, 60, (rows, length), generator=torch.Generator().manual_seed(2))
    mixture = ["a", {"a": 0.3, "b": 0.9}, "b", "dense", "b", "a", "a", "b", "a"][:rows]
    merged, together = (
        sparse.forward(ids, mixture=mixture, apply=apply).logits for apply in ("merge", "rows")
    )
    torch.testing.assert_close(together, merged, rtol=1e-4, atol=1e-5)
