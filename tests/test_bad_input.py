"""Every input that cannot be merged: one readable line, an exit status that is not 0, nothing published."""

import errno
import json
import os
import shutil
import socket

import pico
import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

from mergekit_mediator import MediatorModel, merge
from mergekit_mediator.artifact import read_manifest
from mergekit_mediator.expert_file import ExpertWriter
from mergekit_mediator.weights import Inputs


@pytest.fixture
def damaged(family, tmp_path):
    """The family with one expert, `code`, copied to where it may be damaged."""
    path = shutil.copytree(family.experts["code"], tmp_path / "damaged")
    return type(family)(family.base, {**family.experts, "code": path})


@pytest.fixture
def refused(mergekit_yaml, tmp_path):
    """Runs the stock command, which must refuse; gives the one line that it says."""

    def run(config, *options):
        result = mergekit_yaml(config, tmp_path / "out", *options)
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code != 0
        lines = [line for line in result.output.splitlines() if line.startswith("Error")]
        assert len(lines) == 1, result.output
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out*"))
        return lines[0]

    return run


def change_weights(path, change):
    file = path / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def change_config(path, **settings):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **settings}))


def test_a_base_that_is_not_given(family, refused):
    assert "base_model: required" in refused(family.config(base_model=None))


def test_a_base_that_is_not_there(family, refused, tmp_path):
    message = refused(family.config(base_model=str(tmp_path / "nowhere")))
    assert "base_model" in message
    assert str(tmp_path / "nowhere") in message


def test_an_expert_that_is_not_there(damaged, refused):
    shutil.rmtree(damaged.experts["code"])
    assert f"model {damaged.experts['code']}: " in refused(damaged.config())


def test_one_expert_only(family, refused):
    config = family.config()
    config["models"] = config["models"][:1]
    assert "at least two experts required, got 1" in refused(config)


def test_two_experts_of_one_name(family, refused):
    config = family.config()
    for entry in config["models"]:
        entry["parameters"]["expert"] = "same"
    assert "both named 'same'" in refused(config)


def test_an_expert_of_another_architecture(family, make, refused):
    other = make(pico.qwen3).experts["code"]
    config = family.config()
    config["models"][1]["model"] = str(other)
    message = refused(config)
    assert str(other) in message
    assert "Qwen3ForCausalLM, but the base" in message


def test_an_expert_with_tied_weights_where_the_base_has_none(family, make, refused):
    config = family.config()
    config["models"][1]["model"] = str(make(pico.llama_tied).experts["code"])
    assert "tie_word_embeddings is True, but False in the base" in refused(config)


def test_an_expert_of_another_shape(family, make, refused):
    other = make(lambda: pico.llama(intermediate_size=40)).experts["code"]
    config = family.config()
    config["models"][1]["model"] = str(other)
    message = refused(config)
    assert "mlp" in message
    assert f"[40, 16] in {other}, but [24, 16] in the base" in message


@pytest.mark.parametrize("layers", [2, 4])
def test_an_expert_of_another_depth(family, make, refused, layers):
    config = family.config()
    other = make(lambda: pico.llama(num_hidden_layers=layers)).experts["code"]
    config["models"][1]["model"] = str(other)
    assert "layer" in refused(config)


def test_an_expert_of_another_vocabulary_says_what_to_put_under_tokenizer(family, make, refused):
    config = family.config()
    config["models"][1]["model"] = str(make(lambda: pico.llama(vocab_size=70)).experts["code"])
    message = refused(config)
    assert "model.embed_tokens.weight: shape [70, 16]" in message
    assert "tokenizer: {source: base}" in message


def test_a_checkpoint_that_is_missing(damaged, refused):
    (damaged.experts["code"] / "model.safetensors").unlink()
    assert str(damaged.experts["code"]) in refused(damaged.config())


@pytest.fixture
def sharded(make):
    """A family of which every model is stored in several files."""
    return make(max_shard_size="3KB")


def test_a_shard_that_is_missing(sharded, refused):
    shard = sorted(sharded.experts["code"].glob("*.safetensors"))[1]
    shard.unlink()
    assert f"{shard}: cannot be read" in refused(sharded.config())


def test_a_shard_that_is_truncated(sharded, refused):
    shard = sorted(sharded.experts["code"].glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 10)
    message = refused(sharded.config())
    assert f"{shard}: " in message
    assert "truncated" in message


def test_a_shard_that_the_index_places_outside_the_model(sharded, refused):
    index = sharded.experts["code"] / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    content["weight_map"][name] = "../base/model.safetensors"
    index.write_text(json.dumps(content))
    assert "'../base/model.safetensors', which is outside the model" in refused(sharded.config())


def test_a_weight_that_is_in_the_index_but_in_no_shard(sharded, refused):
    shard = sorted(sharded.experts["code"].glob("*.safetensors"))[1]
    weights = load_file(shard)
    name = min(weights)
    del weights[name]
    save_file(weights or {"other": torch.zeros(1)}, shard)
    assert name in refused(sharded.config())


def test_a_checkpoint_that_is_truncated(damaged, refused):
    file = damaged.experts["code"] / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    assert str(damaged.experts["code"]) in refused(damaged.config())


def test_a_checkpoint_that_is_no_safetensors_file(damaged, refused):
    (damaged.experts["code"] / "model.safetensors").write_text("version https://git-lfs")
    assert str(damaged.experts["code"]) in refused(damaged.config())


def test_a_configuration_of_a_model_that_is_no_json(damaged, refused):
    (damaged.experts["code"] / "config.json").write_text("{")
    assert str(damaged.experts["code"]) in refused(damaged.config())


def test_a_weight_that_one_expert_lacks(damaged, refused):
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(damaged.experts["code"], lambda weights: weights.pop(name))
    assert name in refused(damaged.config())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("settings", [{}, {"route": "all"}, {"route": "none"}])
def test_a_weight_that_is_not_finite(damaged, refused, value, settings):
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


@pytest.mark.parametrize("density", [0, -0.5, 1.5])
def test_a_density_outside_its_range(family, refused, density):
    assert "density" in refused(family.config(density=density))


@pytest.mark.parametrize("density", ["dense", [0.1, 2.0]])
def test_a_density_that_is_no_fraction(family, refused, density):
    assert "density" in refused(family.config(density=density))


def test_a_density_outside_its_range_for_one_expert(family, refused):
    config = family.config()
    config["models"][2]["parameters"]["density"] = 0
    assert "density" in refused(config)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"denstiy": 0.1}, ["'denstiy'", "density"]),
        ({"conflict": "cosine"}, ["conflict", "'cosine'"]),
        ({"values": "fp8"}, ["values", "'fp8'"]),
        ({"route": "all", "routed_layers": "1"}, ["route and routed_layers contradict"]),
        ({"routed_layers": "9"}, ["routed_layers", "'9'", "embed, 0-2, final"]),
        ({"weight": "much"}, ["weight"]),
        ({"weight": 0}, ["weight", "0"]),
        ({"weight": -1}, ["weight", "-1"]),
    ],
)
def test_unknown_and_contradictory_parameters(family, refused, settings, parts):
    message = refused(family.config(**settings))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("settings", [{"density": 0}, {"routed_layers": "9"}, {"denstiy": 1}])
def test_wrong_parameters_are_refused_before_any_weight_is_read(
    family, refused, monkeypatch, settings
):
    monkeypatch.delattr(Inputs, "load")
    assert next(iter(settings)) in refused(family.config(**settings))


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
def test_a_pickled_checkpoint_that_is_damaged(pickled, refused, content):
    (pickled.experts["code"] / "pytorch_model.bin").write_bytes(content)
    assert str(pickled.experts["code"]) in refused(pickled.config())


def test_a_pickled_checkpoint_that_is_truncated(pickled, refused):
    file = pickled.experts["code"] / "pytorch_model.bin"
    os.truncate(file, file.stat().st_size // 2)
    assert str(pickled.experts["code"]) in refused(pickled.config())


def test_an_index_that_is_damaged(sharded, refused):
    for content in ("{", "{}", "[]"):
        (sharded.experts["code"] / "model.safetensors.index.json").write_text(content)
        assert f"model {sharded.experts['code']}: cannot be loaded" in refused(sharded.config())


def test_a_pickled_expert_of_another_shape(pickled, refused):
    file = pickled.experts["code"] / "pytorch_model.bin"
    weights = torch.load(file)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = torch.zeros(40, 16)
    torch.save(weights, file)
    assert f"{name}: shape [40, 16]" in refused(pickled.config())


def test_slices_that_leave_out_an_expert(family, refused):
    models = [family.base, *list(family.experts.values())[:2]]
    sources = [{"model": str(m), "layer_range": [0, 2]} for m in models]
    rest = {"model": str(family.experts["chat"]), "layer_range": [2, 3]}
    config = family.config()
    del config["models"]
    slices = [{"sources": sources}, {"sources": [{**s, "layer_range": [2, 3]} for s in sources]}]
    slices[1]["sources"].append(rest)
    assert "slices: " in refused({**config, "slices": slices})


def test_pickles_are_never_written(family, refused):
    assert "--no-safe-serialization" in refused(family.config(), "--no-safe-serialization")


def test_an_output_directory_that_holds_a_model(family, mergekit_yaml, merged, tmp_path):
    out = merged(family.config())
    before = (out / "mediator/manifest.json").read_bytes()
    result = mergekit_yaml(family.config(route="none"), out)
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert "--overwrite" in result.output
    assert (out / "mediator/manifest.json").read_bytes() == before


def test_a_disk_that_is_too_small_is_noticed_before_weights_are_read(family, refused, monkeypatch):
    usage = type(shutil.disk_usage("/"))(10**9, 10**9 - 100, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(Inputs, "load", None)
    message = refused(family.config())
    assert "disk full" in message
    assert "100 free" in message


@pytest.mark.parametrize("place", ["append", "close"])
def test_a_disk_that_fills_up_while_experts_are_written(family, refused, monkeypatch, place):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ExpertWriter, place, fail)
    message = refused(family.config())
    assert "out: cannot be written" in message
    assert "No space left on device" in message


def test_a_disk_that_fills_up_while_the_dense_expert_is_written(family, refused, monkeypatch):
    import safetensors.torch
    from safetensors import SafetensorError

    def fail(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    assert "No space left on device" in refused(family.config())


def test_a_relative_path_needs_no_network(family, tmp_path, monkeypatch):
    """mergekit's own model card asks the Hub whether a relative path is one of its models."""
    import click.testing
    import huggingface_hub.constants
    from mergekit.scripts.run_yaml import main

    def refuse(*arguments, **_):
        raise AssertionError(f"network: {arguments}")

    shutil.copytree(family.base.parent, tmp_path / "models")
    monkeypatch.chdir(tmp_path / "models")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    models = [{"model": name} for name in family.experts]
    config = {"merge_method": "mediator", "base_model": "base", "models": models}
    (tmp_path / "models/config.yml").write_text(yaml.safe_dump(config))
    arguments = ["config.yml", "out", "--quiet"]
    result = click.testing.CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert read_manifest(tmp_path / "models/out").expert_names == tuple(family.experts)
    MediatorModel.from_pretrained("out")


@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
def test_a_dtype_that_is_none_is_refused_before_any_weight_is_read(family, refused, key):
    message = refused(family.config(**{key: "floatt32"}))
    assert f"{key}: one of float32, bfloat16, float16, float64 required, got 'floatt32'" in message


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"out_dtpye": "bfloat16"}, ["configuration: unknown key 'out_dtpye'", "'out_dtype'"]),
        ({"parameter": {}}, ["unknown key 'parameter'", "did you mean 'parameters'"]),
        ({"tokenizer": {"sorce": "base"}}, ["tokenizer: unknown key 'sorce'", "'source'"]),
        (
            {"parameters": {"density": [{"filtr": "mlp", "value": 0.3}, {"value": 0.1}]}},
            ["parameters.density[0]: unknown key 'filtr'", "'filter'"],
        ),
    ],
)
def test_keys_that_mergekit_would_pass_over_are_refused_with_the_nearest(
    family, refused, change, parts
):
    message = refused({**family.config(), **change})
    for part in parts:
        assert part in message


def test_a_misspelt_key_of_a_model_is_refused(family, refused):
    config = family.config()
    config["models"][1]["paramters"] = {"weight": 2.0}
    message = refused(config)
    assert "models[1]: unknown key 'paramters': did you mean 'parameters'?" in message


@pytest.mark.parametrize("budget", ["0.5x", "1x", "1kB"])
def test_a_budget_below_the_dense_expert_is_refused_before_weights_are_read(
    family, refused, monkeypatch, budget
):
    monkeypatch.setattr(Inputs, "load", None)
    message = refused(family.config(budget=budget))
    assert f"budget: {budget} is" in message
    assert "raise it above 1x" in message


def test_paths_may_hold_spaces_and_letters_of_any_alphabet(family, merged, tmp_path):
    root = shutil.copytree(family.base.parent, tmp_path / "ein Ordner für 日本")
    moved = type(family)(root / "base", {n: root / p.name for n, p in family.experts.items()})
    config = moved.config()
    del config["parameters"]
    out = merged(config, name="ein Ergebnis ö")
    assert read_manifest(out).base.source == str(moved.base)
