import json

import pytest
import torch
from adapters import train

from mergekit_mediator import MediatorModel
from mergekit_mediator.errors import InputError
from mergekit_mediator.merge.adapters.lora import read_adapter
from mergekit_mediator.store.manifest import read_manifest


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_alpha": 5},
        {"use_rslora": True, "r": 4},
        {"rank_pattern": {"q_proj": 1}},
        {"alpha_pattern": {"layers.1.mlp.down_proj": 30}},
    ],
    ids=str,
)
def test_the_factors_are_the_change_that_the_adapter_makes(family, tmp_path, settings):
    change = train(family.base, tmp_path / "a", 0, **settings)
    factors = read_adapter(tmp_path / "a")
    assert factors is not None
    assert factors.keys() == change.keys()
    for name, tau in change.items():
        torch.testing.assert_close(factors[name].product(), tau, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "lora_only"},
        {"target_modules": ["embed_tokens"]},
    ],
    ids=str,
)
def test_an_adapter_that_changes_more_is_not_taken_by_its_factors(family, tmp_path, settings):
    train(family.base, tmp_path / "a", 0, **settings)
    assert read_adapter(tmp_path / "a") is None


@pytest.mark.parametrize(
    "setting",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"arrow_config": {"top_k": 2}},
        {"monteclora_config": {"num_samples": 2}},
    ],
    ids=str,
)
def test_an_adapter_that_changes_the_base_or_the_forward_pass_is_not_taken_by_its_factors(
    family, tmp_path, setting
):
    train(family.base, tmp_path / "a", 0)
    path = tmp_path / "a/adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "a setting of nobody's": 1}))
    assert read_adapter(tmp_path / "a") is not None
    path.write_text(json.dumps({**config, **setting}))
    assert read_adapter(tmp_path / "a") is None


def test_a_head_that_is_saved_beside_its_factors_must_be_that_of_the_base(family, tmp_path, read):
    change = train(family.base, tmp_path / "a", 0, target_modules=["lm_head", "q_proj"])
    base = read(family.base)
    assert read_adapter(tmp_path / "a", base.get).keys() == change.keys()
    assert read_adapter(tmp_path / "a") is None
    assert read_adapter(tmp_path / "a", lambda name: base[name] + 1) is None


def test_factors_of_a_head_that_is_brought_to_another_vocabulary_are_merged_first(
    family, merged, tmp_path
):
    models = []
    for seed, name in enumerate("ab"):
        train(family.base, tmp_path / name, seed, target_modules=["lm_head", "q_proj"])
        models.append({"model": f"{family.base}+{tmp_path / name}"})
    for tokenizer, factored in ((None, True), ({"source": "union"}, False)):
        config = family.config(models=models)
        out = merged(
            {**config, "tokenizer": tokenizer} if tokenizer else config, name=str(factored)
        )
        stored = MediatorModel.from_pretrained(out)._mixer.experts.files["a"].weights
        assert bool(stored["model.layers.0.self_attn.q_proj.weight"].factors) == factored


def test_a_damaged_adapter_is_named(family, tmp_path):
    train(family.base, tmp_path / "a", 0)
    (tmp_path / "a/adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: cannot be read"):
        read_adapter(tmp_path / "a")
    (tmp_path / "a/adapter_config.json").write_text("{")
    with pytest.raises(InputError, match=r"adapter_config\.json: cannot be read"):
        read_adapter(tmp_path / "a")


@pytest.fixture
def adapters(family, tmp_path):
    changes = {name: train(family.base, tmp_path / name, i) for i, name in enumerate("ab")}
    models = [{"model": f"{family.base}+{tmp_path / name}"} for name in changes]
    return models, changes


@pytest.mark.parametrize("reference", ["mean", "base"])
def test_adapters_keep_their_own_factors_and_give_their_experts_back(
    family, merged, read, adapters, reference
):
    models, changes = adapters
    out = merged(family.config(models=models, route="all", reference=reference))
    base = read(family.base)
    model = MediatorModel.from_pretrained(out)
    for name, change in changes.items():
        with model.mixture({name: 1.0}) as mixed:
            state = mixed.state_dict()
            for key, weight in base.items():
                expected = weight.float() + change.get(key, torch.zeros(()))
                torch.testing.assert_close(state[key].float(), expected, rtol=0.02, atol=0.002)


def test_adapters_take_fewer_bytes_by_their_factors(family, merged, adapters):
    models, _ = adapters
    factored = merged(family.config(models=models, route="all"))
    sparse = merged(family.config(models=models, route="all", density=1.0), name="sparse")

    def size(out):
        files = read_manifest(out).files
        return sum(d.bytes for name, d in files.items() if name.startswith("mediator/experts"))

    assert size(factored) < size(sparse)


def test_an_adapter_of_another_base_is_merged_first(family, merged, adapters, tmp_path):
    models, _ = adapters
    other = {"model": f"{family.experts['code']}+{tmp_path / 'b'}"}
    out = merged(family.config(models=[models[0], other], route="all"))
    model = MediatorModel.from_pretrained(out)
    assert model.experts == ("a", "b")
    assert json.loads((out / "mediator/manifest.json").read_text())["experts"][1]["name"] == "b"


def test_an_adapter_that_is_not_there_is_named(family, mergekit_yaml, adapters, tmp_path):
    models = [adapters[0][0], {"model": f"{family.base}+{tmp_path / 'gone'}"}]
    result = mergekit_yaml(family.config(models=models), tmp_path / "out")
    assert isinstance(result.exception, SystemExit), result.exception
    assert "gone" in result.output
    assert not (tmp_path / "out").exists()
