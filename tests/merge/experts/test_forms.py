"""The form in which `keep` stores each expert: random signs where they keep enough in fewer bits, else low rank plus sparse."""

from dataclasses import replace

import pico
import pytest
import torch
from commands import call, figures, write
from families import make_family
from mergekit.config import MergeConfiguration

from mergekit_mediator import MediatorModel
from mergekit_mediator.errors import ConfigError
from mergekit_mediator.merge.config import MediatorConfig
from mergekit_mediator.merge.conflict import Conflict
from mergekit_mediator.merge.estimate import Size
from mergekit_mediator.merge.experts.forms import choose_forms, compared_names
from mergekit_mediator.merge.experts.spectra import Spectra
from mergekit_mediator.merge.measured import Measured
from mergekit_mediator.store.expert_file import ExpertFile
from mergekit_mediator.store.manifest import read_manifest

_DEFAULT = {
    "merge_method": "mediator",
    "base_model": "base",
    "models": [{"model": "one"}, {"model": "two"}],
    "parameters": {"keep": 0.99},
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """`light` changed less than a hundredth of the base, as the fine-tunes that signs were tried on; `heavy` more."""
    root = tmp_path_factory.mktemp("mixed")

    def written(name, size):
        model = pico.llama(hidden_size=128, intermediate_size=256, vocab_size=512)
        options = {"experts": (name,), "dtype": torch.float32, "size": size}
        return make_family(root / name, lambda: model, **options)

    torch.manual_seed(0)
    light = written("light", 5e-5)
    torch.manual_seed(0)
    heavy = written("heavy", 5e-3)
    return replace(light, experts={**light.experts, **heavy.experts})


@pytest.fixture(scope="module")
def merged_mixed(mixed, tmp_path_factory):
    out = tmp_path_factory.mktemp("merged") / "out"
    config = write(mixed.config(keep=0.97, reference="base"), out.parent / "config.yml")
    assert call("merge", config, out, "--quiet").exit_code == 0
    return out


def forms(out, expert):
    entries = ExpertFile(out / f"mediator/experts/{expert}.safetensors").weights.values()
    return {entry.values for entry in entries if len(entry.shape) == 2}


def stored(out, expert, name, dense):
    return ExpertFile(out / f"mediator/experts/{expert}.safetensors").read(name).change(dense)


def test_every_expert_takes_the_form_of_the_fewest_bits(merged_mixed):
    assert forms(merged_mixed, "light") == {"random_sign"}
    assert forms(merged_mixed, "heavy") == {"steps"}
    parameters = read_manifest(merged_mixed).parameters
    assert parameters["forms"] == {"light": "random_sign", "heavy": "low_rank"}
    assert all(part["predicted"] >= 0.97 for part in parameters["kept"].values())


def test_beside_a_heavy_expert_a_light_one_is_no_signs_of_the_difference_from_their_mean(
    mixed, tmp_path
):
    """That difference is half of the heavy change, and so is what its noise would be."""
    config = write(mixed.config(keep=0.97), tmp_path / "config.yml")
    assert call("merge", config, tmp_path / "out", "--quiet").exit_code == 0
    assert forms(tmp_path / "out", "light") == forms(tmp_path / "out", "heavy") == {"steps"}


def test_experts_of_two_forms_are_served_in_one_mixture(merged_mixed):
    model = MediatorModel.from_pretrained(merged_mixed, dtype="float32")
    name = "model.layers.0.mlp.down_proj.weight"
    dense = model.model.state_dict()[name].clone()
    changes = [stored(merged_mixed, expert, name, dense) for expert in ("light", "heavy")]
    with model.mixture({"light": 0.25, "heavy": 0.75}) as served:
        wanted = dense + 0.25 * changes[0] + 0.75 * changes[1]
        assert torch.allclose(served.state_dict()[name], wanted, atol=1e-6)
    assert torch.equal(model.model.state_dict()[name], dense)


def test_an_artifact_of_two_forms_is_verified_inspected_and_renamed(merged_mixed, tmp_path):
    assert call("verify", merged_mixed).exit_code == 0
    assert call("inspect", merged_mixed).exit_code == 0
    renamed = call("rename-expert", merged_mixed, "light", "lighter")
    assert renamed.exit_code == 0, renamed.output
    assert "lighter" in read_manifest(merged_mixed).parameters["forms"]
    assert call("rename-expert", merged_mixed, "lighter", "light").exit_code == 0


def test_an_added_expert_takes_its_own_form(mixed, tmp_path):
    alone = replace(mixed, experts={"heavy": mixed.experts["heavy"]})
    out = tmp_path / "out"
    config = write(alone.config(keep=0.97), tmp_path / "config.yml")
    assert call("merge", config, out, "--quiet").exit_code == 0
    added = call("add-expert", out, mixed.experts["light"], "--name", "light")
    assert added.exit_code == 0, added.output
    assert forms(out, "light") == {"random_sign"}
    assert read_manifest(out).parameters["forms"]["light"] == "random_sign"


def test_plan_tells_how_many_experts_become_signs(mixed, tmp_path):
    config = write(mixed.config(keep=0.97, reference="base"), tmp_path / "config.yml")
    points = figures("plan", config, "--curve", "--quiet")["keep"]
    assert [point["signs"] for point in points] == [1, 1, 1, 0]
    told = call("plan", config, "--curve", "--quiet").output
    assert "stored as signs" in told
    assert "error, noise of signs, is over" in told


@pytest.mark.parametrize("rate", [{"keep": 0.97}, {"bits": 0.5}, {"budget": "1.2x"}])
def test_low_rank_plus_sparse_may_be_asked_for(mixed, tmp_path, rate):
    config = write(mixed.config(values="low_rank", **rate), tmp_path / "config.yml")
    assert call("merge", config, tmp_path / "out", "--quiet").exit_code == 0
    assert forms(tmp_path / "out", "light") == forms(tmp_path / "out", "heavy") == {"steps"}


@pytest.mark.parametrize("rate", [{"bits": 0.5}, {"budget": "1.2x"}])
def test_bits_and_a_budget_alone_store_low_rank_plus_sparse(mixed, tmp_path, rate):
    config = write(mixed.config(**rate), tmp_path / "config.yml")
    assert call("merge", config, tmp_path / "out", "--quiet").exit_code == 0
    assert forms(tmp_path / "out", "light") == {"steps"}


def test_low_rank_without_a_rate_is_refused(mixed):
    config = mixed.config(values="low_rank", density=0.1)
    with pytest.raises(ConfigError, match="values: low_rank is a form of `keep`, `bits` or a"):
        MediatorConfig.from_merge_config(MergeConfiguration.model_validate(config))


def test_forms_are_compared_on_some_weights_and_low_rank_is_measured_on_all(
    mixed, merged_mixed, tmp_path
):
    """The heavy expert's file is that of a merge that measures low rank plus sparse alone."""
    config = mixed.config(keep=0.97, reference="base", values="low_rank")
    path = write(config, tmp_path / "config.yml")
    assert call("merge", path, tmp_path / "out", "--quiet").exit_code == 0
    files = [out / "mediator/experts/heavy.safetensors" for out in (merged_mixed, tmp_path / "out")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_expert_that_becomes_signs_is_hardly_decomposed(mixed, tmp_path, monkeypatch):
    decomposed, decompose = [], Spectra.decompose
    monkeypatch.setattr(
        Spectra, "decompose", lambda *given: decomposed.append(given[1:3]) or decompose(*given)
    )
    config = write(mixed.config(keep=0.97, reference="base"), tmp_path / "config.yml")
    assert call("merge", config, tmp_path / "out", "--quiet").exit_code == 0
    assert len(decomposed) == len(set(decomposed))
    light, heavy = ([w for e, w in decomposed if e == name] for name in ("light", "heavy"))
    assert 0 < len(light) < len(heavy) / 2


def test_compared_weights_are_of_every_size_and_of_every_place_in_a_layer():
    places = ("down_proj", "gate_proj", "up_proj")
    names = [f"layers.{i}.{place}" for i in range(14) for place in places]
    sizes = {name: Size(64, 128) for name in names} | {"embed": Size(512, 1024)}
    config = MediatorConfig.from_merge_config(MergeConfiguration.model_validate(_DEFAULT))
    compared = compared_names(config, [*names, "embed"], sizes)
    assert "embed" in compared
    assert len(compared) == 7
    assert {name.split(".")[-1] for name in compared} == {*places, "embed"}


def test_a_size_of_which_no_weight_was_compared_does_not_count():
    """A buffer of integers may have the place in its size that was to be compared."""
    config = MediatorConfig.from_merge_config(MergeConfiguration.model_validate(_DEFAULT))
    figures = [torch.linspace(8, 800, 120), *(torch.full((120,), n) for n in (1e-3, 1.0, 1e6))]
    costs = torch.stack(figures).double()
    more = costs * torch.tensor([9.0, 1, 1, 1])[:, None]
    both = Measured(Conflict(), ({"low_rank": more, "random_sign": costs},) * 2)
    signs = Measured(Conflict(), ({"random_sign": costs},) * 2)
    sizes = {"buffer": Size(8, 64), "vector": Size(8, 16), "matrix": Size(64, 128)}
    measured = {"buffer": Measured(Conflict(), ()), "vector": signs, "matrix": both}
    assert "vector" not in compared_names(config, sorted(sizes), sizes)
    assert set(choose_forms(config, sorted(sizes), measured, sizes).values()) == {"random_sign"}
    measured["matrix"] = signs
    assert set(choose_forms(config, sorted(sizes), measured, sizes).values()) == {"low_rank"}
