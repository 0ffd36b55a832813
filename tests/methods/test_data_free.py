"""What holds for every merge method of task vectors."""

import mergekit.merge_methods
import pytest
import torch
from mergekit.merge_methods import merge_state_dicts

from mergekit_mediator.merge import plugin
from mergekit_mediator.methods.data_free import DATA_FREE

plugin.install()
NAMES = [method.spec.name for method in DATA_FREE]
SHAPES = {
    "model.embed_tokens.weight": (30, 8),
    "square.weight": (8, 8),
    "tall.weight": (12, 5),
    "wide.weight": (5, 12),
    "norm.weight": (8,),
    "conv.weight": (4, 3, 2),
}
every_method = pytest.mark.parametrize("method", NAMES)


def family(experts, seed=0, dtype=torch.float32, size=0.1):
    """A base and its experts: state dictionaries of several shapes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale):
        return {n: scale * torch.randn(s, generator=generator) for n, s in SHAPES.items()}

    base = draw(1.0)
    taus = [draw(size) for _ in range(experts)]
    models = [base, *({n: base[n] + tau[n] for n in SHAPES} for tau in taus)]
    return [{n: weight.to(dtype) for n, weight in model.items()} for model in models]


def merge(method, models, **parameters):
    return merge_state_dicts(models, method, base=0, parameters=parameters)


def assert_same(actual, expected, tolerance=1e-5):
    assert list(actual) == list(expected)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=tolerance, rtol=0, msg=name)


@every_method
def test_one_expert_comes_back_as_it_is(method):
    base, expert = family(1)
    assert_same(merge(method, [base, expert]), expert, 1e-6)


# opcm takes each expert off those before it: there the order is the method
@pytest.mark.parametrize("method", sorted(set(NAMES) - {"opcm"}))
def test_the_order_of_the_experts_does_not_matter(method):
    base, *experts = family(3)
    assert_same(merge(method, [base, *experts]), merge(method, [base, *experts[::-1]]))


@every_method
def test_experts_that_changed_nothing_give_the_base(method):
    (base,) = family(0)
    assert_same(merge(method, [base, base, base]), base, 0)


@every_method
def test_an_expert_that_changed_nothing_beside_one_that_did_gives_finite_weights(method):
    base, expert = family(1)
    merged = merge(method, [base, expert, base])
    assert all(weight.isfinite().all() for weight in merged.values())


@every_method
def test_experts_that_changed_few_directions_give_no_large_change(method):
    base, first, second = family(2)
    for name in ("square.weight", "tall.weight", "wide.weight"):
        for expert in (first, second):
            expert[name] = base[name] + torch.outer(expert[name][:, 0], expert[name][0])
    merged = merge(method, [base, first, second])
    for name in SHAPES:
        size = float((first[name] - base[name]).norm())
        assert float((merged[name] - base[name]).norm()) < 3 * size, name


@every_method
def test_bfloat16_in_gives_bfloat16_out_rounded_once(method):
    models = family(3, dtype=torch.bfloat16)
    merged = merge(method, models)
    exact = merge(method, [{n: w.float() for n, w in model.items()} for model in models])
    assert_same(merged, {n: w.bfloat16() for n, w in exact.items()}, 0)


@every_method
def test_lambda_scales_the_merged_task_vector(method):
    models = family(3)
    whole, half = merge(method, models), merge(method, models, **{"lambda": 0.5})
    assert_same(half, {n: (whole[n] + models[0][n]) / 2 for n in SHAPES}, 1e-6)


@every_method
def test_transposed_views_give_the_same_and_are_not_changed(method):
    # what mergekit's own tests ask of every registered method
    generator = torch.Generator().manual_seed(42)
    tensors = [torch.randn(4, 6, generator=generator).T for _ in range(3)]
    copies = [tensor.clone() for tensor in tensors]
    expected = merge(method, [{"w": tensor.contiguous()} for tensor in tensors])["w"]
    actual = merge(method, [{"w": tensor} for tensor in tensors])["w"]
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, expected)
    for tensor, before in zip(tensors, copies, strict=True):
        torch.testing.assert_close(tensor, before, rtol=0, atol=0)


@every_method
def test_an_empty_weight_stays_empty(method):
    models = [{"w": torch.empty(0, 4), "v": torch.ones(2) * i} for i in range(3)]
    assert merge(method, models)["w"].shape == (0, 4)


@every_method
def test_every_method_is_registered_with_its_paper(method):
    spec = mergekit.merge_methods.get(method).spec
    assert spec.reference_url.startswith("https://arxiv.org/abs/")
    assert spec.pretty_name
