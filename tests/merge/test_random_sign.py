"""`values: random_sign`: experts as signs at random coordinates."""

import edits
import pico
import pytest
import torch
from commands import call, figures, write

from mergekit_mediator import MediatorModel
from mergekit_mediator.delta.random_sign import random_positions
from mergekit_mediator.store.expert_file import ExpertFile
from mergekit_mediator.store.manifest import read_manifest


@pytest.fixture
def random(family):
    def configured(density=0.2, **parameters):
        return family.config(values="random_sign", density=density, **parameters)

    return configured


def test_a_matrix_holds_signs_at_random_places_and_a_vector_all_its_numbers(
    random, family, merged, read
):
    model = MediatorModel.from_pretrained(merged(random()))
    dense = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    for name, path in family.experts.items():
        weights = read(path)
        with model.mixture(name) as mixed:
            for weight, found in mixed.state_dict().items():
                if weight not in weights:
                    continue  # a tied head
                change = found.float() - dense[weight].float()
                if found.ndim == 1:
                    assert torch.equal(found, weights[weight])
                    continue
                places = random_positions(found.numel(), round(0.2 * found.numel()))
                elsewhere = torch.ones(found.numel(), dtype=torch.bool)
                elsewhere[places.long()] = False
                assert not change.flatten()[elsewhere].any()
                wanted = (weights[weight].float() - dense[weight].float()).flatten()
                is_stored = change.flatten() != 0
                assert 0 < int(is_stored.sum()) < len(places)
                assert torch.equal(change.flatten()[is_stored].sign(), wanted[is_stored].sign())


def test_all_layers_are_routed_unless_the_configuration_chooses(random, merged):
    assert all(layer.routed for layer in read_manifest(merged(random())).layers)
    chosen = read_manifest(merged(random(routed_layers="0"), name="one")).layers
    assert [layer.name for layer in chosen if layer.routed] == ["0"]


def test_plan_predicts_the_bytes(make, tmp_path):
    wide = make(lambda: pico.llama(hidden_size=128, intermediate_size=256, vocab_size=512))
    config = write(wide.config(values="random_sign", density=0.5), tmp_path / "config.yml")
    planned = sum(layer["experts"] for layer in figures("plan", config)["layers"])
    assert call("merge", config, tmp_path / "out", "--quiet").exit_code == 0
    entries = [
        description
        for file in (tmp_path / "out/mediator/experts").iterdir()
        for description in ExpertFile(file).weights.values()
    ]
    actual = sum(sum(entry.sizes) for entry in entries if len(entry.shape) == 2)
    assert planned == pytest.approx(actual, rel=0.1)


def test_plan_tells_of_the_noise_and_of_no_budget(random, tmp_path):
    told = call("plan", write(random(), tmp_path / "config.yml")).output
    assert "The smaller `density` is, the more noise comes with each expert." in told
    assert "A budget keeps more" not in told


def test_no_form_is_smaller(random, merged):
    out = merged(random())
    failed = call("requantize", out, "--values", "sign")
    assert failed.exit_code == 1
    assert "has random_sign values, and no form is smaller: merge again" in failed.output


def test_the_base_may_be_the_dense_expert(random, family, merged, read):
    out = merged(random(reference="base"))
    base = read(family.base)
    assert all(torch.equal(weight, base[name]) for name, weight in read(out).items())


def test_an_expert_may_be_added_in_this_form(random, merged, family, tmp_path):
    out, law = merged(random()), edits.one_more(family, tmp_path / "law")
    added = call(
        "add-expert", out, law, "--name", "law", "--values", "random_sign", "--density", 0.3
    )
    assert added.exit_code == 0, added.output
    model = MediatorModel.from_pretrained(out)
    with model.mixture("law") as mixed:
        assert all(bool(w.isfinite().all()) for w in mixed.state_dict().values())
    assert [expert.name for expert in read_manifest(out).experts][-1] == "law"


def test_one_expert_is_stored_relative_to_the_base(make, merged, read):
    one = make(experts=("math",))
    out = merged(one.config(values="random_sign", density=1.0))
    base = read(one.base)
    assert all(torch.equal(weight, base[name]) for name, weight in read(out).items())
    model = MediatorModel.from_pretrained(out)
    with model.mixture("math") as mixed:
        assert any(not torch.equal(w, base[n]) for n, w in mixed.state_dict().items() if n in base)


def test_an_added_expert_takes_the_form_of_the_others(random, merged, family, tmp_path):
    out, law = merged(random()), edits.one_more(family, tmp_path / "law")
    added = call("add-expert", out, law, "--name", "law")
    assert added.exit_code == 0, added.output
    stored = ExpertFile(out / "mediator/experts/law.safetensors").weights.values()
    matrices = [entry for entry in stored if len(entry.shape) == 2]
    assert {entry.values for entry in matrices} == {"random_sign"}
    assert all(entry.count == round(0.2 * entry.numel) for entry in matrices)


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_an_artifact_is_verified_and_described(command, random, merged):
    checked = call(command, merged(random()))
    assert checked.exit_code == 0, checked.output
