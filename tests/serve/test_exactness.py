import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_mediator import MediatorModel

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def bits(model):
    return {n: w.view(BITS[w.dtype]).clone() for n, w in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", list(BITS), ids=str)
def test_every_expert_comes_back_bit_for_bit(dtype, make, merged, read):
    family = make(dtype=dtype)
    out = merged(family.config(route="all", density=1.0))
    model = MediatorModel.from_pretrained(out)
    for name, path in family.experts.items():
        expert = {n: w.view(BITS[dtype]) for n, w in read(path).items()}
        with model.mixture({name: 1.0}) as mixed:
            assert same(bits(mixed), expert)


@pytest.fixture(scope="module")
def model(make, tmp_path_factory):
    """An artifact with two routed layers and quantised values, loaded."""
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_mediator.merge.run import run

    config = make().config(routed_layers="0,final", density=0.3, values="int4")
    out = tmp_path_factory.mktemp("exact") / "out"
    run(MergeConfiguration.model_validate(config), str(out), MergeOptions(quiet=True))
    return MediatorModel.from_pretrained(out)


def test_a_thousand_mixtures_leave_the_dense_expert_as_it_was(model):
    before = bits(model.model)
    generator = torch.Generator().manual_seed(0)
    for weights in torch.rand(1000, 3, generator=generator).tolist():
        with model.mixture(dict(zip(model.experts, weights, strict=True))):
            pass
    assert same(bits(model.model), before)


@given(st.lists(st.floats(0, 3), min_size=3, max_size=3).filter(any))
def test_a_mixture_is_the_weighted_sum_of_what_each_expert_adds(model, weights):
    dense = {n: w.float() for n, w in model.model.state_dict().items()}
    expected = {n: w.clone() for n, w in dense.items()}
    for name, weight in zip(model.experts, weights, strict=True):
        for key, stored in model._mixer.placer.expert(name).items():
            difference = stored.codes.float() * stored.scale
            expected[key].view(-1)[stored.positions] += weight * difference
    with model.mixture(dict(zip(model.experts, weights, strict=True))) as mixed:
        for key, weight in mixed.state_dict().items():
            torch.testing.assert_close(weight.float(), expected[key], rtol=2**-8, atol=1e-6)


def test_layers_that_are_not_routed_are_the_same_in_every_mixture(model):
    before = bits(model.model)
    routed = {weight for layer in model.manifest.routed_layers for weight in layer.weights}
    with model.mixture({"math": 1.0}) as mixed:
        after = bits(mixed)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == routed
