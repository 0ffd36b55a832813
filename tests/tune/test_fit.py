"""What prompts change of a stored expert, against the expert itself."""

import copy
from dataclasses import replace

import pico
import pytest
import torch

from mergekit_mediator.delta.approximate import approximate
from mergekit_mediator.delta.factors import unrounded
from mergekit_mediator.delta.stored_weight import mix_
from mergekit_mediator.errors import PromptError
from mergekit_mediator.models.locate import locate_weights
from mergekit_mediator.store.codec import encode_bytes
from mergekit_mediator.tune import fit as distil
from mergekit_mediator.tune import tunable
from mergekit_mediator.tune.teacher import answer

PROMPTS = [[1, 4 + i, 5 + i % 7, 6 + i % 5] for i in range(24)]
END = 2


def parts_of(model, stored, changes):
    weights = located(model)
    parts = {n: tunable.tunable(weights[n], t, changes[n]) for n, t in stored.items()}
    return {name: part for name, part in parts.items() if part}


def tuned(model, stored, answers, changes, step=lambda _: None):
    return distil.distil(model, parts_of(model, stored, changes), answers, step)


def located(model):
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return locate_weights(model, shapes, shapes)


def put(model, weights, stored=None):
    """The base's weights, with what is stored of the expert if that is given."""
    with torch.no_grad():
        for name, weight in located(model).items():
            weight.copy_(weights[name])
            if stored is not None:
                mix_(weight, [(1.0, replace(stored[name], share=0.0))])


@pytest.fixture(scope="module")
def case():
    """A base's weights, what is stored of its expert, the expert's answers, a model to hold them, and the
    expert's changes in full."""
    torch.manual_seed(0)
    base = pico.llama(hidden_size=64, intermediate_size=96, head_dim=32)
    expert = copy.deepcopy(base).eval()
    generator = torch.Generator().manual_seed(1)
    for weight in located(expert).values():
        change = torch.randn(weight.shape, generator=generator) * 0.01
        if weight.dim() == 2:
            left, right = (torch.randn(n, 3, generator=generator) for n in weight.shape)
            change += 0.03 * left @ right.T
        weight.add_(change)
    answers = answer(expert, PROMPTS, pad=0)
    own = dict(located(base))
    stored = {
        name: approximate(weight - own[name], 2e-3, torch.bfloat16)
        for name, weight in located(expert).items()
    }
    changes = {name: weight - own[name] for name, weight in located(expert).items()}
    return {n: w.clone() for n, w in own.items()}, stored, answers, base.eval(), changes


@pytest.fixture
def model(case, monkeypatch):
    monkeypatch.setattr(distil, "_ROUNDS", 20)
    monkeypatch.setattr(tunable, "SCALE_RATE", 0.03)
    monkeypatch.setattr(tunable, "CODE_RATE", 0.01)
    put(case[3], case[0], case[1])
    return case[3]


def test_answers_are_those_of_greedy_decoding_with_their_end(case):
    base, _, _, model, _ = case
    put(model, base)
    for answered in answer(model, PROMPTS[:9], pad=0):
        prompt = torch.tensor([answered.prompt])
        alone = model.generate(prompt, max_new_tokens=60, do_sample=False)[0, prompt.shape[1] :]
        assert answered.answer == alone.tolist()[: len(answered.answer)]
        assert answered.answer[-1] == END or prompt.shape[1] + len(answered.answer) == 64
        logits = model(torch.tensor([answered.prompt + answered.answer])).logits[0]
        logs = logits[prompt.shape[1] - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(logs.gather(1, answered.likely), answered.logs)


def test_a_prompt_without_room_for_an_answer_is_refused(model):
    with pytest.raises(PromptError, match=r"a prompt of 64 tokens leaves no room .* reads 64"):
        answer(model, [[4] * 64], pad=0)


def test_gradients_are_those_of_autograd_through_the_product(case, model):
    _, stored, answers, _, changes = case
    weights = located(model)
    names = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    parts = [tunable.tunable(weights[name], stored[name], changes[name]) for name in names]
    with distil._gradients(model, parts):
        torch.stack(list(distil._losses(model, answers[:3]))).mean().backward()

    factors = stored[names[0]].factors
    kept = {name: weights[name].clone() for name in names}
    scales = torch.zeros(factors.rank, requires_grad=True)
    left, right = (f.float().requires_grad_() for f in (factors.left, factors.right))
    vector = torch.zeros(kept[names[1]].numel(), requires_grad=True)
    product = left * (factors.scales * (1 + scales)) @ right.T
    unit = stored[names[1]].difference(torch.zeros(stored[names[1]].positions.numel()))
    changed = {
        names[0]: kept[names[0]] - factors.product() + product,
        names[1]: kept[names[1]] + vector * unit.square().mean().sqrt(),
    }
    call = torch.func.functional_call

    class Changed:
        config, forward = model.config, model.forward
        parameters = model.parameters

        def __call__(self, **inputs):
            return call(model, changed, kwargs=inputs)

    torch.stack(list(distil._losses(Changed(), answers[:3]))).mean().backward()
    moved = [parameter for part in parts for _, parameter in part.parameters()]
    for parameter, expected in zip(moved, [scales, left, right, vector], strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-3, atol=1e-6)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_what_is_stored_comes_nearer_and_takes_as_many_bytes_within_a_hundredth(case, model):
    base, stored, answers, _, changes = case
    weights = located(model)
    seen = []
    found = tuned(model, stored, answers, changes, seen.append)
    assert found.after < 0.8 * found.before
    assert sum(seen) == distil.seen(len(answers))
    moved = 0
    for name, tensor in found.stored.items():
        old = stored[name]
        assert torch.equal(tensor.positions, old.positions) or len(old.shape) == 1
        if old.factors:
            moved += int((tensor.factors.left != old.factors.left).sum())
            sides = zip(_sides(tensor), _sides(old), strict=True)
            assert all(o.min() <= n.min() and n.max() <= o.max() for n, o in sides)
            assert torch.equal(tensor.codes, old.codes)
            assert not torch.equal(tensor.factors.scales, old.factors.scales)
            rebuilt = base[name].clone()
            mix_(rebuilt, [(1.0, tensor)])
            torch.testing.assert_close(rebuilt, weights[name], rtol=1e-4, atol=1e-4)
    assert moved
    sizes = [
        sum(encode_bytes(t)[0].numel() for t in tensors.values())
        for tensors in (stored, {**stored, **found.stored})
    ]
    assert sizes[1] < 1.01 * sizes[0]


def _sides(tensor):
    """Of each component, all its codes."""
    return torch.cat([tensor.factors.left, tensor.factors.right]).T.int()


def test_codes_start_between_what_is_stored_and_what_it_is_of(case):
    _, stored, _, _, changes = case
    for name, tensor in stored.items():
        if tensor.factors:
            sides = unrounded(changes[name], tensor.factors)
            kept = (tensor.factors.left, tensor.factors.right)
            for side, codes in zip(sides, kept, strict=True):
                assert torch.equal(side.round().to(torch.int8), codes)
                assert not torch.equal(side, codes.float())


def test_a_share_in_the_dense_weight_counts(case, model):
    name = "model.layers.1.mlp.up_proj.weight"
    _, stored, _, _, changes = case
    shared = replace(stored[name], share=0.25)
    weight = located(model)[name]
    part, before = tunable.tunable(weight, shared, changes[name]), weight.clone()
    (_, scales), *_ = part.parameters()
    scales.data.fill_(0.5)
    part.apply()
    torch.testing.assert_close(weight - before, 0.75 * 0.5 * shared.factors.product())
    assert part.result().factors.scales.equal(shared.factors.scales * 1.5)
    assert tunable.tunable(weight, replace(shared, share=1.0), changes[name]) is None


def test_few_tokens_at_once_give_the_same_as_many(case, model, monkeypatch):
    base, stored, answers, _, changes = case
    first = tuned(model, stored, answers, changes)
    put(model, base, stored)
    monkeypatch.setattr(distil, "TOKENS_AT_ONCE", 100)
    second = tuned(model, stored, answers, changes)
    assert second.after == pytest.approx(first.after, rel=0.05)
    monkeypatch.setattr(distil, "TOKENS_AT_ONCE", 150)
    parts = list(distil._parts(answers, 0))
    assert [a for part in parts for a in part] == answers
    for part in parts:
        longest = max(len(a.prompt) + len(a.answer) for a in part)
        assert len(part) == 1 or longest * len(part) <= 150
    assert 1 < max(map(len, parts)) < len(answers)


def test_the_figures_are_those_of_what_is_stored(case, model):
    base, stored, answers, _, changes = case
    found = tuned(model, stored, answers, changes)
    put(model, base, {**stored, **found.stored})
    again = distil._divergence(model, answers[:: distil._HELD_OUT])
    assert again == pytest.approx(found.after, rel=0.05)


def test_nothing_changes_where_prompts_do_not_help(case, model, monkeypatch):
    monkeypatch.setattr(tunable, "SCALE_RATE", 3.0)
    found = tuned(model, case[1], case[2], case[4])
    assert not found.stored
    assert found.after == found.before


def test_equal_inputs_give_equal_results(case, model):
    base, stored, answers, _, changes = case
    first = tuned(model, stored, answers, changes)
    put(model, base, stored)
    second = tuned(model, stored, answers, changes)
    for name, tensor in first.stored.items():
        other = second.stored[name]
        assert torch.equal(tensor.codes, other.codes)
        if tensor.factors:
            assert torch.equal(tensor.factors.scales, other.factors.scales)
            assert torch.equal(tensor.factors.left, other.factors.left)
