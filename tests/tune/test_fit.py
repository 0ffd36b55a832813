"""Prompts bring the stored form of an expert nearer to the expert."""

import copy
from dataclasses import replace

import pico
import pytest
import torch

from mergekit_mediator.delta.approximate import approximate
from mergekit_mediator.delta.factors import unrounded
from mergekit_mediator.delta.mixing import mix_
from mergekit_mediator.errors import PromptError
from mergekit_mediator.models.locate import locate_weights
from mergekit_mediator.store.codec import encode_bytes
from mergekit_mediator.tune import fit
from mergekit_mediator.tune.teacher import answer
from mergekit_mediator.tune.tunable import tunable

PROMPTS = [[1, 4 + i, 5 + i % 7, 6 + i % 5] for i in range(24)]
END = 2
ROUNDS = 20


def parts_of(model, stored, changes, scale_rate):
    weights = located(model)
    parts = {
        name: tunable(weights[name], tensor, changes[name], scale_rate, code_rate=0.01)
        for name, tensor in stored.items()
    }
    return {name: part for name, part in parts.items() if part}


def tuned(model, stored, answers, changes, scale_rate=0.03, **options):
    parts = parts_of(model, stored, changes, scale_rate)
    return fit.distil(model, parts, answers, rounds=ROUNDS, **options)


def located(model):
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return locate_weights(model, shapes, shapes)


def put(model, weights, stored=None):
    """Put the base's weights into a model, and the stored form of the expert if there is one."""
    with torch.no_grad():
        for name, weight in located(model).items():
            weight.copy_(weights[name])
            if stored is not None:
                mix_(weight, [(1.0, replace(stored[name], share=0.0))])


@pytest.fixture(scope="module")
def case():
    """A base's weights, the stored form of its expert, the expert's answers, a model, and the expert's changes."""
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
    weights = dict(located(base))
    changes = {name: weight - weights[name] for name, weight in located(expert).items()}
    stored = {n: approximate(change, 2e-3, torch.bfloat16) for n, change in changes.items()}
    return {n: w.clone() for n, w in weights.items()}, stored, answers, base.eval(), changes


@pytest.fixture
def model(case):
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
    parts = [tunable(weights[name], stored[name], changes[name]) for name in names]
    with fit.gradients(model, parts):
        torch.stack(list(fit.divergences(model, answers[:3]))).mean().backward()

    factors = stored[names[0]].factors
    unchanged = {name: weights[name].clone() for name in names}
    scales = torch.zeros(factors.rank, requires_grad=True)
    left, right = (f.float().requires_grad_() for f in (factors.left, factors.right))
    vector = torch.zeros(unchanged[names[1]].numel(), requires_grad=True)
    product = left * (factors.scales * (1 + scales)) @ right.T
    unit = stored[names[1]].difference(torch.zeros(stored[names[1]].positions.numel()))
    changed = {
        names[0]: unchanged[names[0]] - factors.product() + product,
        names[1]: unchanged[names[1]] + vector * unit.square().mean().sqrt(),
    }
    call = torch.func.functional_call

    class Changed:
        config, forward = model.config, model.forward
        parameters = model.parameters

        def __call__(self, **inputs):
            return call(model, changed, kwargs=inputs)

    torch.stack(list(fit.divergences(Changed(), answers[:3]))).mean().backward()
    parameters = [parameter for part in parts for _, parameter in part.parameters()]
    for parameter, expected in zip(parameters, [scales, left, right, vector], strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-3, atol=1e-6)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_the_stored_form_comes_nearer_and_its_bytes_stay_within_a_hundredth(case, model):
    base, stored, answers, _, changes = case
    weights = located(model)
    batches = []
    result = tuned(model, stored, answers, changes, step=batches.append)
    assert result.after < 0.8 * result.before
    assert sum(batches) == fit.seen(len(answers), ROUNDS)
    changed_codes = 0
    for name, tensor in result.stored.items():
        old = stored[name]
        assert torch.equal(tensor.positions, old.positions) or len(old.shape) == 1
        if old.factors:
            changed_codes += int((tensor.factors.left != old.factors.left).sum())
            sides = zip(_sides(tensor), _sides(old), strict=True)
            assert all(o.min() <= n.min() and n.max() <= o.max() for n, o in sides)
            assert torch.equal(tensor.codes, old.codes)
            assert not torch.equal(tensor.factors.scales, old.factors.scales)
            rebuilt = base[name].clone()
            mix_(rebuilt, [(1.0, tensor)])
            torch.testing.assert_close(rebuilt, weights[name], rtol=1e-4, atol=1e-4)
    assert changed_codes
    sizes = [
        sum(encode_bytes(t)[0].numel() for t in tensors.values())
        for tensors in (stored, {**stored, **result.stored})
    ]
    assert sizes[1] < 1.01 * sizes[0]


def _sides(tensor):
    """Of each component, all its codes."""
    return torch.cat([tensor.factors.left, tensor.factors.right]).T.int()


def test_unrounded_codes_round_to_the_stored_codes(case):
    _, stored, _, _, changes = case
    factored = {name: tensor.factors for name, tensor in stored.items() if tensor.factors}
    assert len(factored) > 10
    for name, factors in factored.items():
        sides = unrounded(changes[name], factors)
        for side, codes in zip(sides, (factors.left, factors.right), strict=True):
            assert torch.equal(side.round().to(torch.int8), codes)
            assert not torch.equal(side, codes.float())


def test_a_share_in_the_dense_weight_counts(case, model):
    name = "model.layers.1.mlp.up_proj.weight"
    _, stored, _, _, changes = case
    shared = replace(stored[name], share=0.25)
    weight = located(model)[name]
    part, before = tunable(weight, shared, changes[name]), weight.clone()
    (_, scales), *_ = part.parameters()
    scales.data.fill_(0.5)
    part.apply()
    torch.testing.assert_close(weight - before, 0.75 * 0.5 * shared.factors.product())
    assert part.result().factors.scales.equal(shared.factors.scales * 1.5)
    assert tunable(weight, replace(shared, share=1.0), changes[name]) is None


def test_few_tokens_at_once_give_the_same_as_many(case, model):
    base, stored, answers, _, changes = case
    first = tuned(model, stored, answers, changes)
    put(model, base, stored)
    second = tuned(model, stored, answers, changes, tokens_at_once=100)
    assert second.after == pytest.approx(first.after, rel=0.05)
    parts = fit._parts(answers, 0, tokens_at_once=150)
    assert [a for part in parts for a in part] == answers
    for part in parts:
        longest = max(len(a.prompt) + len(a.answer) for a in part)
        assert len(part) == 1 or longest * len(part) <= 150
    assert 1 < max(map(len, parts)) < len(answers)


def test_the_divergence_after_a_fit_is_that_of_the_new_stored_form(case, model):
    base, stored, answers, _, changes = case
    result = tuned(model, stored, answers, changes)
    put(model, base, {**stored, **result.stored})
    again = fit.divergence(model, answers[:: fit.HELD_OUT])
    assert again == pytest.approx(result.after, rel=0.05)


def test_a_fit_that_does_not_help_changes_nothing(case, model):
    _, stored, answers, _, changes = case
    result = tuned(model, stored, answers, changes, scale_rate=3.0)
    assert not result.stored
    assert result.after == result.before


def test_equal_inputs_give_equal_results(case, model):
    base, stored, answers, _, changes = case
    first = tuned(model, stored, answers, changes)
    put(model, base, stored)
    second = tuned(model, stored, answers, changes)
    assert first.stored
    for name, tensor in first.stored.items():
        other = second.stored[name]
        assert torch.equal(tensor.codes, other.codes)
        if tensor.factors:
            assert torch.equal(tensor.factors.scales, other.factors.scales)
            assert torch.equal(tensor.factors.left, other.factors.left)
