"""A base and one fine-tune: a compressed fine-tune."""

import adapters
import pytest
import torch
from commands import call, figures, write

from mergekit_mediator import MediatorModel
from mergekit_mediator.store.manifest import read_manifest


@pytest.fixture
def one(make):
    return make(experts=("math",))


@pytest.mark.parametrize("storage", [{"bits": 8}, {"budget": "4x"}, {"keep": 1 - 1e-12}])
def test_one_expert_is_stored_relative_to_the_base(one, merged, read, storage):
    out = merged(one.config(**storage))
    base, expert = read(one.base), read(one.experts["math"])
    dense = read(out)
    assert all(torch.equal(dense[name], weight) for name, weight in base.items())
    model = MediatorModel.from_pretrained(out)
    with model.mixture("math") as routed:
        weights = {n: w.detach() for n, w in routed.named_parameters()}
        left = sum(
            float((weights[n].float() - w.float()).square().sum()) for n, w in expert.items()
        )
    whole = sum(float((base[n].float() - w.float()).square().sum()) for n, w in expert.items())
    assert 0 < left < 0.01 * whole
    assert all(layer.routed for layer in read_manifest(out).layers)


def test_every_request_goes_to_the_one_expert(one, merged):
    model, ids = MediatorModel.from_pretrained(merged(one.config(bits=8))), torch.tensor([[5, 6]])
    decision = model.route(ids)
    assert decision.weights.tolist() == [[1.0]]
    assert decision.entropy.tolist() == [0.0]
    assert str(decision.entropy.item()) == "0.0"
    expected = model.forward(ids, mixture="math").logits
    assert torch.equal(model.forward(ids).logits, expected)


def test_one_adapter_keeps_its_own_factors(one, merged, tmp_path):
    adapters.train(one.base, tmp_path / "adapter", seed=1)
    config = one.config()
    config["models"] = [{"model": f"{one.base}+{tmp_path / 'adapter'}"}]
    model = MediatorModel.from_pretrained(merged(config))
    assert model.experts == ("adapter",)
    assert model.manifest.parameters["reference"] == "base"


def test_layers_may_be_chosen_for_one_expert(one, merged):
    manifest = read_manifest(merged(one.config(bits=8, routed_layers="0")))
    assert [layer.routed for layer in manifest.layers].count(True) == 1


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"route": "auto"},
            "models: one expert is stored by `keep`, `bits`, a `budget` or `values: random_sign`, got none",
        ),
        (
            {"density": 0.1},
            "models: one expert is stored by `keep`, `bits`, a `budget` or `values: random_sign`, got none",
        ),
        (
            {"bits": 2, "reference": "mean"},
            "reference: the mean of one expert is this expert, and nothing would be left to store",
        ),
    ],
)
def test_one_expert_needs_a_rate_and_no_mean(one, refused, parameters, message):
    assert message in refused(one.config(**parameters))


def test_plan_and_inspect_show_one_expert(one, merged, tmp_path):
    config = write(one.config(bits=8), tmp_path / "one.yml")
    assert call("plan", config).exit_code == 0
    assert [e["name"] for e in figures("inspect", merged(one.config(bits=8)))["experts"]] == [
        "math"
    ]
