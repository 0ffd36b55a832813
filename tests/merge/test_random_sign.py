"""`values: random_sign`: experts as signs at random coordinates."""

from pathlib import Path

import edits
import pico
import pytest
import torch
from commands import call, figures, write
from mergekit.config import MergeConfiguration

from mergekit_mediator import MediatorModel
from mergekit_mediator.delta.random_sign import random_positions
from mergekit_mediator.errors import ConfigError
from mergekit_mediator.merge.config import MediatorConfig
from mergekit_mediator.models.loading import load_plain
from mergekit_mediator.store.expert_file import ExpertFile
from mergekit_mediator.store.manifest import read_manifest


@pytest.fixture
def random(family):
    def configured(density=0.2, **parameters):
        return family.config(values="random_sign", density=density, **parameters)

    return configured


def parsed(config):
    return MediatorConfig.from_merge_config(MergeConfiguration.model_validate(config))


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


@pytest.fixture(scope="module")
def wide(make):
    return make(lambda: pico.llama(hidden_size=128, intermediate_size=256, vocab_size=512))


@pytest.mark.parametrize("asked", [0.3, 1.0])
def test_experts_take_the_bits_that_were_asked_for(wide, tmp_path, asked):
    config = write(wide.config(values="random_sign", bits=asked), tmp_path / "config.yml")
    assert call("merge", config, tmp_path / "out", "--quiet").exit_code == 0
    of_signs = 0.0
    for file in (tmp_path / "out/mediator/experts").iterdir():
        entries = ExpertFile(file).weights.values()
        assert {entry.values for entry in entries if len(entry.shape) == 2} == {"random_sign"}
        of_signs += sum(8 * sum(entry.sizes) for entry in entries)
    parameters = sum(w.numel() for w in load_plain(tmp_path / "out").state_dict().values())
    assert of_signs / parameters / len(wide.experts) == pytest.approx(asked, rel=0.15)


def test_a_budget_is_kept_to_and_spent(wide, tmp_path):
    config = write(wide.config(values="random_sign", budget="1.3x"), tmp_path / "config.yml")
    assert call("merge", config, tmp_path / "out", "--quiet").exit_code == 0
    files = {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()}
    sizes = {path: (tmp_path / "out" / path).stat().st_size for path in files}
    dense = sum(size for path, size in sizes.items() if len(path.parts) == 1)
    assert 1.2 < sum(sizes.values()) / dense <= 1.3


@pytest.fixture(scope="module")
def light(make):
    """Fine-tunes whose change is less than a hundredth of the base, as those that the prediction knows."""
    wide = pico.llama(hidden_size=128, intermediate_size=256, vocab_size=512)
    return make(lambda: wide, dtype=torch.float32, size=5e-5)


def test_every_expert_takes_the_signs_that_keep_its_part(light, tmp_path):
    """A larger part takes more bits, and the artifact states the prediction."""
    taken = []
    for keep in (0.97, 0.99):
        config = write(light.config(values="random_sign", keep=keep), tmp_path / f"{keep}.yml")
        assert call("merge", config, tmp_path / str(keep), "--quiet").exit_code == 0
        kept = read_manifest(tmp_path / str(keep)).parameters["kept"].values()
        assert all(part["predicted"] == pytest.approx(keep, abs=2e-3) for part in kept)
        taken.append(
            sum(f.stat().st_size for f in (tmp_path / f"{keep}/mediator/experts").iterdir())
        )
    assert taken[0] < taken[1]


def test_more_than_signs_can_keep_is_told_in_one_line(wide, tmp_path):
    config = write(wide.config(values="random_sign", keep=0.9999), tmp_path / "config.yml")
    merged = call("merge", config, tmp_path / "out", "--quiet")
    assert merged.exit_code == 0
    assert "warning: keep: random signs cannot keep 0.9999: " in merged.output
    assert "leave out `values`, or lower keep" in merged.output


def test_a_change_as_large_as_the_base_is_not_said_to_be_kept(wide, tmp_path):
    config = write(wide.config(values="random_sign", keep=0.5), tmp_path / "config.yml")
    told = call("merge", config, tmp_path / "out", "--quiet").output
    assert "random signs cannot keep 0.5: " in told
    assert "is predicted to keep 0.0000 of its gain" in told


def test_the_curve_tells_of_noise(light, tmp_path):
    config = write(light.config(values="random_sign", keep=0.9), tmp_path / "config.yml")
    told = call("plan", config, "--curve", "--quiet", "--plot", tmp_path / "curve.svg").output
    assert "error, noise of signs, is over" in told
    drawn = (tmp_path / "curve.svg").read_text()
    assert "gain kept" in drawn
    assert "squared change kept" not in drawn
    assert "change kept" not in told
    parts = [point["keep"] for point in figures("plan", config, "--curve", "--quiet")["keep"]]
    assert parts == [0.9, 0.97, 0.99]  # and none that signs cannot keep


@pytest.mark.parametrize("other", [{"density": 0.1, "keep": 0.9}, {"rank": 8}])
def test_signs_take_one_rate_and_no_rank(wide, other):
    with pytest.raises(ConfigError, match="contradict each other: give one of them"):
        parsed(wide.config(values="random_sign", **other))


def test_a_misspelt_form_is_told_from_one_that_takes_no_rate(wide):
    expected = r"values: Input should be .*'low_rank' or 'random_sign', got 'lowrank'"
    with pytest.raises(ConfigError, match=expected):
        parsed(wide.config(values="lowrank", keep=0.9))


def test_other_values_take_no_rate(wide):
    with pytest.raises(ConfigError, match="keep and values contradict each other"):
        parsed(wide.config(values="int4", keep=0.9))


def test_an_expert_is_added_at_the_rate_of_the_others(wide, family, tmp_path):
    config = write(wide.config(values="random_sign", keep=0.97), tmp_path / "config.yml")
    out = tmp_path / "out"
    assert call("merge", config, out, "--quiet").exit_code == 0
    again = next(iter(wide.experts.values()))
    assert call("add-expert", out, again, "--name", "again").exit_code == 0
    added = ExpertFile(out / "mediator/experts/again.safetensors").weights.values()
    assert {entry.values for entry in added} == {"random_sign", "exact"}
    signs = sum(sum(e.sizes) for e in added if e.values == "random_sign")
    others = ExpertFile(
        out / "mediator/experts" / f"{Path(again).name}.safetensors"
    ).weights.values()
    assert signs == pytest.approx(
        sum(sum(e.sizes) for e in others if e.values == "random_sign"), rel=0.2
    )


def test_the_rank_of_an_adapter_is_not_chosen_by_the_noise(random, merged, tmp_path):
    out = merged(random())
    exported = call("export", out, tmp_path / "auto", "--rank", "auto", "--drop")
    assert exported.exit_code == 0, exported.output
    assert (
        "holds every direction above the noise of random signs: math 8, code 8, chat 8. "
        in exported.output
    )
    assert "at which the matrices keep" not in exported.output
    chosen = figures("export", out, tmp_path / "json", "--rank", "auto", "--drop")["experts"][0]
    assert chosen["choice"]["kept"] is None


def test_no_form_is_smaller(random, merged):
    out = merged(random())
    failed = call("requantize", out, "--values", "sign")
    assert failed.exit_code == 1
    assert (
        "is stored as random signs, whose noise a smaller form would keep: merge again"
        in failed.output
    )


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
