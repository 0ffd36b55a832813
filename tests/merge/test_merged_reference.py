"""`reference: METHOD`: the dense expert is the experts' merge by another method, and they are stored relative to it."""

from typing import get_args

import adapters
import edits
import pytest
import torch
from commands import call, write
from safetensors.torch import load_file

from mergekit_mediator import MediatorModel
from mergekit_mediator.merge.config import Reference
from mergekit_mediator.merge.editing.add import add_expert
from mergekit_mediator.merge.editing.remove import remove_expert
from mergekit_mediator.merge.editing.requantize import requantize
from mergekit_mediator.merge.experts import tuning
from mergekit_mediator.route.response import ResponseRouter
from mergekit_mediator.store.manifest import RESPONSE, read_manifest
from mergekit_mediator.store.verification import verify_files

METHODS = [name for name in get_args(Reference) if name not in ("mean", "base")]


@pytest.fixture
def prompted(tmp_path):
    """Gives a configuration's experts a file of prompts each."""

    def give(config):
        for n, entry in enumerate(config["models"]):
            file = tmp_path / f"prompts-{n}.jsonl"
            lines = [f'{{"prompt": "w{n} w{k} w{3 * k % 17}"}}' for k in range(8)]
            file.write_text("\n".join(lines))
            entry.setdefault("parameters", {})["prompts"] = str(file)
        return config

    return give


def configured(family, prompted, method, **parameters):
    config = family.config(reference=method, **parameters)
    return prompted(config) if method == "regmean_pp" else config


def tensors(directory):
    return load_file(directory / "model.safetensors")


def squared(weights, others):
    return sum(float((weights[n].float() - w.float()).square().sum()) for n, w in others.items())


@pytest.mark.parametrize("method", METHODS)
def test_the_dense_expert_is_what_the_method_merges(family, merged, prompted, read, method):
    out = merged(
        configured(family, prompted, method, bits=6, dtype="float32", out_dtype="bfloat16")
    )
    alone = family.config(method, dtype="float32", out_dtype="bfloat16")
    expected = read(merged(prompted(alone) if method == "regmean_pp" else alone, name="alone"))
    dense = read(out)
    assert all(torch.equal(dense[name], weight) for name, weight in expected.items())
    manifest = read_manifest(out)
    verify_files(out, manifest)
    assert manifest.parameters["reference"] == method
    assert all(layer.routed for layer in manifest.layers)
    assert not [path for path in out.rglob(".*") if path.is_dir()]
    assert f"the experts' merge by `{method}`" in (out / "README.md").read_text()


@pytest.mark.parametrize("method", METHODS)
def test_experts_are_stored_relative_to_it(family, merged, prompted, read, method):
    out = merged(configured(family, prompted, method, bits=8))
    dense, model = read(out), MediatorModel.from_pretrained(out)
    for name, path in family.experts.items():
        with model.mixture(name) as routed:
            served = {n: w.detach().clone() for n, w in routed.named_parameters()}
        expert = read(path)
        assert 0 < squared(served, expert) < 0.02 * squared(dense, expert), name


def test_tuning_starts_from_what_is_stored(family, merged, prompted, monkeypatch):
    """A stored form is tuned towards the difference from the dense expert, of which it is an approximation."""
    near = []
    tunable = tuning.tunable

    def noted(place, stored, change):
        if stored.factors is not None or stored.positions.numel():
            whole = change.norm()
            near.append(float((stored.change(torch.zeros_like(change)) - change).norm() / whole))
        return tunable(place, stored, change)

    monkeypatch.setattr(tuning, "tunable", noted)
    merged(prompted(family.config(reference="wudi", bits=8)))
    assert near
    assert max(near) < 0.3


def test_experts_are_not_exported_relative_to_the_base(family, merged, tmp_path):
    out = merged(family.config(reference="wudi", bits=6))
    refused = call("export", out, tmp_path / "adapters", "--rank", "4", "--relative-to", "base")
    assert refused.exit_code != 0
    assert "is stored relative to the dense expert: export relative to dense" in refused.output
    written = call("export", out, tmp_path / "adapters", "--rank", "4", "--drop")
    assert written.exit_code == 0, written.output


def test_a_density_of_one_gives_the_expert_s_bits_back(family, merged, read):
    out = merged(family.config(reference="wudi", density=1.0, route="all"))
    model = MediatorModel.from_pretrained(out)
    for name, path in family.experts.items():
        with model.mixture(name) as routed:
            weights = dict(routed.named_parameters())
            assert all(torch.equal(weights[n], w) for n, w in read(path).items())


def test_the_budget_is_spent_on_the_differences_from_it(family, merged):
    out = merged(family.config(reference="tsvm", budget="4x"))
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    checkpoint = sum(path.stat().st_size for path in out.iterdir() if path.is_file())
    assert 0.8 * 4 * checkpoint < size <= 4 * checkpoint


def test_the_router_knows_the_changes_from_the_base(family, merged):
    routers = [
        ResponseRouter.load(merged(family.config(bits=6, reference=r), name=r) / RESPONSE)
        for r in ("base", "wudi")
    ]
    base, other = (router.directions for router in routers)
    assert base.keys() == other.keys()
    assert base
    assert all(torch.equal(base[name], vectors) for name, vectors in other.items())


def test_where_the_router_is_not_sure_the_dense_expert_answers(family, merged):
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4, dtype=torch.int64)
    for reference, unsure in (("mean", "blend"), ("tsvm", "dense")):
        out = merged(family.config(bits=6, reference=reference), name=reference)
        model = MediatorModel.from_pretrained(out)
        assert model.describe_router()[1].unsure == unsure
        model.entropy_threshold = 0.0  # never sure
        decision = model.route(ids, mask)
        expected = [[0.0] * 3] if unsure == "dense" else decision.weights.tolist()
        assert model.mixtures(decision).tolist() == expected


@pytest.mark.parametrize("reference", ["mean", "wudi"])
def test_what_prompts_measure_is_the_gain_over_the_base(
    family, merged, prompted, monkeypatch, reference
):
    """A merge has much of the gain itself; the mean is what experts add to."""
    compared = []
    measure = tuning.divergence

    def divergence(model, answers):
        weight = model.get_input_embeddings().weight
        compared.append(weight.detach().to(torch.bfloat16).clone())
        return measure(model, answers)

    monkeypatch.setattr(tuning, "divergence", divergence)
    out = merged(prompted(family.config(reference=reference, keep=0.5)))
    parts = read_manifest(out).parameters["kept"].values()
    assert len(parts) == 3
    assert all(part["measured"] <= 1 for part in parts)
    expected = tensors(family.base if reference == "wudi" else out)["model.embed_tokens.weight"]
    assert compared
    assert all(torch.equal(weight, expected) for weight in compared)


def test_adapters_are_stored_relative_to_it(family, merged, tmp_path, read):
    config = family.config(reference="tsvm", bits=8, dtype="float32", out_dtype="bfloat16")
    config["models"] = []
    for seed, name in enumerate(("one", "two")):
        adapters.train(family.base, tmp_path / name, seed=seed)
        config["models"].append({"model": f"{family.base}+{tmp_path / name}"})
    out = merged(config)
    whole = {**config, "merge_method": "tsvm", "parameters": {}}
    expected = read(merged(whole, name="alone"))
    assert all(torch.equal(read(out)[name], weight) for name, weight in expected.items())


def test_an_expert_is_added_relative_to_it_and_requantized_and_removed(
    family, merged, read, tmp_path
):
    out = merged(family.config(reference="wudi", bits=8))
    law, dense = edits.one_more(family, tmp_path / "law"), read(out)
    add_expert(out, str(law), "law", bits=8)
    model, expert = MediatorModel.from_pretrained(out), read(law)
    with model.mixture("law") as routed:
        served = {n: w.detach().clone() for n, w in routed.named_parameters()}
    assert 0 < squared(served, expert) < 0.02 * squared(dense, expert)
    requantize(out, bits=4, experts=["law"])
    edited = remove_expert(out, "math")
    assert "the dense expert, a merge of all by wudi, still holds it" in edited.changes[-1].note
    assert all(torch.equal(read(out)[name], weight) for name, weight in dense.items())


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"reference": "ties"},
            "parameters: reference: Input should be 'mean', 'base', 'regmean_pp', 'tsvm' or 'wudi', got 'ties'",
        ),
        (
            {"reference": "wudi", "lambda": 0.5},
            "parameters: lambda belongs to the mean of the experts, and the dense expert is their merge by wudi: "
            "remove it, or `reference`",
        ),
        (
            {"reference": "regmean_pp"},
            "math: prompts: required by reference: regmean_pp, got none: add `prompts: FILE.jsonl`",
        ),
    ],
)
def test_a_merge_that_the_method_cannot_make_is_refused(family, refused, parameters, message):
    assert message in refused(family.config(bits=4, **parameters))


def test_a_weight_of_one_expert_is_refused(family, refused):
    config = family.config(bits=4, reference="wudi")
    config["models"][1]["parameters"]["weight"] = 2.0
    message = refused(config)
    assert message.startswith("Error: model ")
    assert "code: weight belongs to the mean of the experts" in message


def test_slices_are_refused(family, refused):
    config = family.config(bits=4, reference="wudi")
    sources = [{"model": entry["model"], "layer_range": [0, 3]} for entry in config.pop("models")]
    config["slices"] = [{"sources": sources}]
    assert "reference: wudi merges whole models: leave out `slices`" in refused(config)


def test_one_expert_has_no_merge(make, refused):
    one = make(experts=("math",))
    message = "reference: the wudi of one expert is this expert, and nothing would be left to store"
    assert message in refused(one.config(bits=4, reference="wudi"))


def test_plan_tells_of_the_merge_before_and_predicts_no_curve(family, tmp_path):
    config = write(family.config(reference="wudi", keep=0.99), tmp_path / "config.yml")
    told = call("plan", config)
    assert "The dense expert is merged by wudi first" in told.output
    refused = call("plan", config, "--curve")
    assert refused.exit_code != 0
    assert "with `reference: wudi` they are relative to a merge that is not there yet" in (
        refused.output
    )
