"""Every model that cannot be merged: one readable line, an exit status that is not 0, nothing published."""

import json
import os
import shutil

import pico
import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

from mergekit_mediator import MediatorModel
from mergekit_mediator.merge import run as merge


@pytest.fixture
def damaged(family, tmp_path):
    """The family with one expert, `code`, copied to where it may be damaged."""
    path = shutil.copytree(family.experts["code"], tmp_path / "damaged")
    return type(family)(family.base, {**family.experts, "code": path})


def change_weights(path, change):
    file = path / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def change_config(path, **settings):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **settings}))


def test_a_base_that_is_not_given_is_refused(family, refused):
    assert "base_model: required" in refused(family.config(base_model=None))


def test_a_base_that_is_not_there_is_refused(family, refused, tmp_path):
    message = refused(family.config(base_model=str(tmp_path / "nowhere")))
    assert f"base_model {tmp_path / 'nowhere'}: its configuration cannot be read" in message


def test_an_expert_that_is_not_there_is_refused(damaged, refused):
    shutil.rmtree(damaged.experts["code"])
    assert f"model {damaged.experts['code']}: " in refused(damaged.config())


def test_a_merge_without_experts_is_refused(family, refused):
    config = family.config()
    config["models"] = [{"model": str(family.base)}]
    assert "at least one expert required, got 0" in refused(config)


def test_two_experts_of_one_name_are_refused(family, refused):
    config = family.config()
    for entry in config["models"]:
        entry["parameters"]["expert"] = "same"
    assert "both named 'same'" in refused(config)


def test_an_expert_of_another_architecture_is_refused(family, make, refused):
    other = make(pico.qwen3).experts["code"]
    config = family.config()
    config["models"][1]["model"] = str(other)
    message = refused(config)
    assert str(other) in message
    assert "Qwen3ForCausalLM, but the base" in message


def test_an_expert_with_tied_weights_where_the_base_has_none_is_refused(family, make, refused):
    config = family.config()
    config["models"][1]["model"] = str(make(pico.llama_tied).experts["code"])
    assert "tie_word_embeddings is True, but False in the base" in refused(config)


def test_an_expert_of_another_shape_is_refused(family, make, refused):
    other = make(lambda: pico.llama(intermediate_size=40)).experts["code"]
    config = family.config()
    config["models"][1]["model"] = str(other)
    message = refused(config)
    assert "mlp" in message
    assert f"[40, 16] in {other}, but [24, 16] in the base" in message


@pytest.mark.parametrize("layers", [2, 4])
def test_an_expert_of_another_depth_is_refused(family, make, refused, layers):
    config = family.config()
    other = make(lambda: pico.llama(num_hidden_layers=layers)).experts["code"]
    config["models"][1]["model"] = str(other)
    assert "without slices the same number of layers" in refused(config)


def test_an_expert_of_another_vocabulary_says_what_to_put_under_tokenizer(family, make, refused):
    config = family.config()
    config["models"][1]["model"] = str(make(lambda: pico.llama(vocab_size=70)).experts["code"])
    message = refused(config)
    assert "model.embed_tokens.weight: shape [70, 16]" in message
    assert "tokenizer: {source: base}" in message


def test_a_checkpoint_that_is_missing_is_refused(damaged, refused):
    (damaged.experts["code"] / "model.safetensors").unlink()
    assert str(damaged.experts["code"]) in refused(damaged.config())


@pytest.fixture
def sharded(make):
    """A family of which every model is stored in several files."""
    return make(max_shard_size="3KB")


def test_a_shard_that_is_missing_is_refused(sharded, refused):
    shard = sorted(sharded.experts["code"].glob("*.safetensors"))[1]
    shard.unlink()
    assert f"{shard}: cannot be read" in refused(sharded.config())


def test_a_shard_that_is_truncated_is_refused(sharded, refused):
    shard = sorted(sharded.experts["code"].glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 10)
    message = refused(sharded.config())
    assert f"{shard}: " in message
    assert "truncated" in message


def test_a_shard_that_the_index_places_outside_the_model_is_refused(sharded, refused):
    index = sharded.experts["code"] / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    content["weight_map"][name] = "../base/model.safetensors"
    index.write_text(json.dumps(content))
    assert "'../base/model.safetensors', which is outside the model" in refused(sharded.config())


def test_a_weight_that_is_in_the_index_but_in_no_shard_is_refused(sharded, refused):
    shard = sorted(sharded.experts["code"].glob("*.safetensors"))[1]
    weights = load_file(shard)
    name = min(weights)
    del weights[name]
    save_file(weights or {"other": torch.zeros(1)}, shard)
    assert name in refused(sharded.config())


def test_a_checkpoint_that_is_truncated_is_refused(damaged, refused):
    file = damaged.experts["code"] / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    assert str(damaged.experts["code"]) in refused(damaged.config())


def test_a_checkpoint_that_is_no_safetensors_file_is_refused(damaged, refused):
    (damaged.experts["code"] / "model.safetensors").write_text("version https://git-lfs")
    assert str(damaged.experts["code"]) in refused(damaged.config())


def test_a_configuration_of_a_model_that_is_no_json_is_refused(damaged, refused):
    (damaged.experts["code"] / "config.json").write_text("{")
    assert str(damaged.experts["code"]) in refused(damaged.config())


def test_a_weight_that_one_expert_lacks_is_refused(damaged, refused):
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(damaged.experts["code"], lambda weights: weights.pop(name))
    assert name in refused(damaged.config())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("settings", [{}, {"route": "all"}, {"route": "none"}])
def test_a_weight_that_is_not_finite_is_refused(damaged, refused, value, settings):
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(damaged.experts["code"], lambda weights: weights[name][3, 4].fill_(value))
    message = refused(damaged.config(**settings))
    assert f"{name}: NaN or infinity in {damaged.experts['code']}" in message
    assert "--allow-nonfinite" in message


def test_weights_that_are_not_finite_may_be_allowed(damaged, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(damaged.experts["code"], lambda w: w[name][3, 4].fill_(float("nan")))
    config = MergeConfiguration.model_validate(damaged.config(route="all", density=1.0))
    out = str(tmp_path / "out")
    merge.run(config, out, MergeOptions(quiet=True), allow_nonfinite=True)
    model = MediatorModel.from_pretrained(out)
    with model.mixture({"code": 1.0}) as mixed:
        assert bool(mixed.state_dict()[name][3, 4].isnan())


@pytest.fixture
def pickled(damaged):
    """The damaged expert as a checkpoint of the old kind."""
    path = damaged.experts["code"]
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    return damaged


@pytest.mark.parametrize("option", ["--lazy-unpickle", "--no-lazy-unpickle"])
def test_a_pickled_checkpoint_is_read(pickled, family, merged, read, option):
    dense, expected = (
        read(merged(pickled.config(), option)),
        read(merged(family.config(), name="o")),
    )
    assert all(torch.equal(dense[name], expected[name]) for name in expected)


@pytest.mark.parametrize("content", [b"", b"\x80\x02garbage", b"version https://git-lfs"])
def test_a_pickled_checkpoint_that_is_damaged_is_refused(pickled, refused, content):
    (pickled.experts["code"] / "pytorch_model.bin").write_bytes(content)
    assert str(pickled.experts["code"]) in refused(pickled.config())


def test_a_pickled_checkpoint_that_is_truncated_is_refused(pickled, refused):
    file = pickled.experts["code"] / "pytorch_model.bin"
    os.truncate(file, file.stat().st_size // 2)
    assert str(pickled.experts["code"]) in refused(pickled.config())


def test_an_index_that_is_damaged_is_refused(sharded, refused):
    for content in ("{", "{}", "[]"):
        (sharded.experts["code"] / "model.safetensors.index.json").write_text(content)
        assert f"model {sharded.experts['code']}: cannot be loaded" in refused(sharded.config())


def test_a_pickled_expert_of_another_shape_is_refused(pickled, refused):
    file = pickled.experts["code"] / "pytorch_model.bin"
    weights = torch.load(file)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = torch.zeros(40, 16)
    torch.save(weights, file)
    assert f"{name}: shape [40, 16]" in refused(pickled.config())
