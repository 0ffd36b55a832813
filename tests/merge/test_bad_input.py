"""Every configuration and output that cannot be: one readable line, nothing read or published."""

import errno
import shutil
import socket
from pathlib import Path

import pytest
import yaml

from mergekit_mediator import MediatorModel
from mergekit_mediator.merge.loaders import OpenInputs
from mergekit_mediator.store.expert_file import ExpertWriter
from mergekit_mediator.store.manifest import read_manifest


@pytest.mark.parametrize("density", [0, -0.5, 1.5])
def test_a_density_outside_its_range_is_refused(family, refused, density):
    message = refused(family.config(density=density))
    assert "parameters: density must be a number in (0, 1], got " in message


@pytest.mark.parametrize("density", ["dense", [0.1, 2.0]])
def test_a_density_that_is_no_fraction_is_refused(family, refused, density):
    message = refused(family.config(density=density))
    assert "parameters: density must be a number in (0, 1], got " in message


def test_a_density_outside_its_range_for_one_expert_is_refused(family, refused):
    config = family.config()
    config["models"][2]["parameters"]["density"] = 0
    message = refused(config)
    assert f"model {family.experts['chat']}: density must be a number in (0, 1], got 0" in message


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"denstiy": 0.1}, ["'denstiy'", "density"]),
        ({"conflict": "cosine"}, ["conflict", "'cosine'"]),
        ({"values": "fp8"}, ["values", "'fp8'"]),
        ({"route": "all", "routed_layers": "1"}, ["route and routed_layers contradict"]),
        ({"routed_layers": "9"}, ["routed_layers", "'9'", "embed, 0-2, final"]),
        ({"weight": "much"}, ["weight must be a finite number", "'much'"]),
        ({"weight": 0}, ["weight: a sum above 0 required"]),
        ({"weight": -1}, ["weight must be a finite number", "got -1"]),
    ],
)
def test_unknown_and_contradictory_parameters_are_refused_by_name(family, refused, settings, parts):
    message = refused(family.config(**settings))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("settings", [{"density": 0}, {"routed_layers": "9"}, {"denstiy": 1}])
def test_wrong_parameters_are_refused_before_any_weight_is_read(
    family, refused, monkeypatch, settings
):
    monkeypatch.delattr(OpenInputs, "load")
    assert next(iter(settings)) in refused(family.config(**settings))


def test_slices_that_leave_out_an_expert_are_refused(family, refused):
    models = [family.base, *list(family.experts.values())[:2]]
    sources = [{"model": str(m), "layer_range": [0, 2]} for m in models]
    rest = {"model": str(family.experts["chat"]), "layer_range": [2, 3]}
    config = family.config()
    del config["models"]
    slices = [{"sources": sources}, {"sources": [{**s, "layer_range": [2, 3]} for s in sources]}]
    slices[1]["sources"].append(rest)
    message = refused({**config, "slices": slices})
    assert f"slices: a slice lacks {family.experts['chat']}" in message


def test_pickles_are_never_written(family, refused):
    assert "--no-safe-serialization" in refused(family.config(), "--no-safe-serialization")


def test_an_output_directory_that_holds_a_model_is_refused(family, mergekit_yaml, merged, tmp_path):
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
    monkeypatch.setattr(OpenInputs, "load", None)
    message = refused(family.config())
    assert "disk full" in message
    assert "100 free" in message


@pytest.mark.parametrize("place", ["append", "close"])
def test_a_disk_that_fills_up_while_experts_are_written_ends_the_merge(
    family, refused, monkeypatch, place
):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ExpertWriter, place, fail)
    message = refused(family.config())
    assert "out: cannot be written" in message
    assert "No space left on device" in message


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_a_disk_that_fills_up_while_the_tokenizer_is_copied_ends_the_merge(
    family, refused, monkeypatch, name
):
    stock = shutil.copy

    def fail(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        stock(source, target)

    monkeypatch.setattr(shutil, "copy", fail)
    message = refused(family.config())
    assert "out: cannot be written" in message
    assert "No space left on device" in message


def test_a_base_without_a_tokenizer_is_merged_with_a_warning(make, mergekit_yaml, tmp_path):
    family = make()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (family.base / name).unlink()
    result = mergekit_yaml(family.config(), tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert f"warning: no tokenizer copied from {family.base}: " in result.output
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_a_disk_that_fills_up_while_the_dense_expert_is_written_ends_the_merge(
    family, refused, monkeypatch
):
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
    monkeypatch.setattr(OpenInputs, "load", None)
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
