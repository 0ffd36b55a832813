import json
import math
import subprocess
import sys
from typing import get_args

import adapters
import pytest
from commands import call, figures, write

from mergekit_mediator.cli.main import main
from mergekit_mediator.route.decision import OodAction, Policy
from mergekit_mediator.store.manifest import read_manifest

COMMANDS = main.list_commands(None)


@pytest.fixture(scope="module")
def out(family, tmp_path_factory):
    """An artifact made by the command `merge`."""
    root = tmp_path_factory.mktemp("cli")
    config = write(family.config(routed_layers="1,final", density=0.5), root / "config.yml")
    result = call("merge", config, root / "out", "--quiet")
    assert result.exit_code == 0, result.output
    assert "3 sparse experts, 2 of 5 layers routed" in result.output
    return root / "out"


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_an_artifact_is_inspected_and_verified_without_torch(out, command):
    code = (
        "import sys\n"
        "from mergekit_mediator.cli.main import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))\n"
    )
    process = [sys.executable, "-c", code, command, str(out)]
    lines = subprocess.run(process, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) > 1
    assert lines[-1] == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    text = " ".join(call(command, "--help").output.split())
    assert f"Example: mergekit-mediator {command}" in text


def test_all_commands_are_listed():
    output = call("--help").output
    assert all(f"  {command} " in output for command in COMMANDS)


def test_an_unknown_command_is_refused():
    assert call("marge").exit_code == 2


def test_inspect_says_what_a_budget_chose_for_each_layer_and_why(family, tmp_path):
    config = write(family.config(budget="4.5x"), tmp_path / "config.yml")
    result = call("merge", config, tmp_path / "out", "--quiet")
    assert result.exit_code == 0, result.output
    shown = figures("inspect", tmp_path / "out")
    for layer in shown["layers"]:
        assert layer["stored"]["bits_per_parameter"] > 0
    text = call("inspect", tmp_path / "out").output
    slopes = shown["settings"]["slopes"].values()
    assert f"saves a squared error of {min(slopes):.2g} to {max(slopes):.2g}, by expert" in text


def test_inspect_gives_no_reason_where_slopes_are_damaged(family, merged):
    out = merged(family.config(budget="12x"))
    path = out / "mediator" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["parameters"]["slopes"] = "damaged"
    path.write_text(json.dumps(manifest))
    result = call("inspect", out)
    assert result.exit_code == 0
    assert "5 of 5 layers routed: " in result.output
    assert "squared error" not in result.output


def test_inspect_leaves_averaged_layers_empty(out):
    stored = {layer["name"]: layer["stored"] for layer in figures("inspect", out)["layers"]}
    assert stored["0"] is None
    assert stored["1"]["density"] == pytest.approx(0.5, abs=0.02)


def test_a_plan_reads_headers_only(family, tmp_path, monkeypatch):
    from mergekit.io.lazy_tensor_loader import LazyTensorLoader

    monkeypatch.setattr(LazyTensorLoader, "get_tensor", None)
    config = write(family.config(route="all"), tmp_path / "config.yml")
    planned = figures("plan", config)
    assert [layer["name"] for layer in planned["layers"]] == ["embed", "0", "1", "2", "final"]
    assert all(layer["routed"] for layer in planned["layers"])
    assert planned["passes"] == 2


def test_a_plan_predicts_memory_from_all_bytes_and_the_largest_weights(
    family, read, tmp_path, monkeypatch
):
    monkeypatch.setattr("mergekit_mediator.merge.estimate.count_workers", lambda: 2)
    planned = figures("plan", write(family.config(route="all"), tmp_path / "config.yml"))
    weights = read(family.base).values()
    all_bytes = sum(w.numel() * w.element_size() for w in weights)
    sizes = sorted(w.numel() for w in weights)
    # Two workers measure the two largest weights: 9 bytes a parameter, and the dense weight.
    largest = max(w.numel() * w.element_size() for w in weights)
    measuring = 9 * (sizes[-1] + sizes[-2]) + 2 * largest
    # The process, all four models mapped, and the dense expert, which is one shard.
    assert planned["peak_memory"] == 700_000_000 + 4 * all_bytes + all_bytes + measuring


def test_a_plan_counts_the_bytes_of_all_inputs(family, read, tmp_path):
    planned = figures("plan", write(family.config(route="none"), tmp_path / "config.yml"))
    size = sum(w.numel() * w.element_size() for w in read(family.base).values())
    assert (planned["passes"], planned["read"]) == (1, 4 * size)
    assert planned["dense"] == size
    assert planned["experts"] == 0
    planned = figures("plan", write(family.config(route="all"), tmp_path / "config.yml"))
    assert (planned["passes"], planned["read"]) == (2, 7 * size)
    # random signs are measured on the difference from the dense expert
    planned = figures("plan", write(family.config(keep=0.99), tmp_path / "config.yml"))
    assert (planned["passes"], planned["read"]) == (3, 10 * size)
    config = family.config(keep=0.99, values="low_rank")
    assert figures("plan", write(config, tmp_path / "config.yml"))["passes"] == 2


def test_a_plan_leaves_open_what_conflict_decides(family, tmp_path):
    config = write(family.config(), tmp_path / "config.yml")
    planned = figures("plan", config)
    assert {layer["routed"] for layer in planned["layers"]} == {None}
    assert planned["passes"] == 2
    assert "add --conflict to measure it" in call("plan", config).output


def test_a_plan_by_density_tells_of_budgets_which_keep_more(family, tmp_path):
    told = "A budget keeps more in as many bytes"
    plain = write(family.config(route="all"), tmp_path / "plain.yml")
    assert told in call("plan", plain).output
    within = write(family.config(budget="1.5x"), tmp_path / "within.yml")
    assert told not in call("plan", within).output


def test_a_plan_says_which_reference_serves_with_the_smallest_ranks(family, tmp_path):
    told = "with `reference: base` each needs its own rank alone"
    mean = write(family.config(route="all"), tmp_path / "mean.yml")
    assert told in call("plan", mean).output
    base = write(family.config(route="all", reference="base"), tmp_path / "base.yml")
    assert told not in call("plan", base).output


def test_a_measured_plan_says_what_the_merge_will_do(family, merged, tmp_path):
    config = family.config(conflict="mass")
    picture = tmp_path / "conflict.png"
    path = write(config, tmp_path / "config.yml")
    planned = figures("plan", path, "--conflict", "--quiet", "--plot", picture)["layers"]
    done = read_manifest(merged(config)).layers
    assert [layer["routed"] for layer in planned] == [layer.routed for layer in done]
    for before, after in zip(planned, done, strict=True):
        assert {"mass", "dispersion"} == set(after.conflict) < set(before["conflict"])
        for metric, value in after.conflict.items():
            assert before["conflict"][metric] == pytest.approx(value)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_plan_of_adapters_merges_nothing(family, tmp_path, monkeypatch):
    from mergekit.common import ModelReference

    monkeypatch.setattr(ModelReference, "merged", None)
    models = [{"model": f"{family.base}+{tmp_path / name}"} for name in ("a", "b")]
    config = write(family.config(models=models, route="all"), tmp_path / "config.yml")
    result = call("plan", config)
    assert result.exit_code == 1
    assert f"{tmp_path / 'a'}: adapter_config.json of an adapter required" in result.output
    for seed, name in enumerate("ab"):
        adapters.train(family.base, tmp_path / name, seed)
        (tmp_path / name / "adapter_model.safetensors").unlink()
    assert all(layer["routed"] for layer in figures("plan", config)["layers"])


def test_a_picture_without_conflict_or_curve_is_refused(family, tmp_path):
    config = write(family.config(), tmp_path / "config.yml")
    for options in ([], ["--conflict", "--curve"]):
        result = call("plan", config, *options, "--plot", tmp_path / "x.png")
        assert result.exit_code == 2
        assert "--plot needs exactly one of --conflict and --curve" in result.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.yml"),
        ("[]", "config.yml"),
        ("merge_method: mediator", "Exactly one of"),
        ("merge_method: linear\nmodels: [{model: a}, {model: b}]", "mediator"),
    ],
)
@pytest.mark.parametrize("command", ["merge", "plan"])
def test_a_file_that_is_no_configuration_of_the_method_is_refused(tmp_path, command, text, message):
    (tmp_path / "config.yml").write_text(text)
    out = [tmp_path / "out"] if command == "merge" else []
    result = call(command, tmp_path / "config.yml", *out)
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert message in result.output
    assert len(result.output.splitlines()) == 1


def test_a_model_is_replaced_with_overwrite_only(family, tmp_path):
    none = write(family.config(route="none"), tmp_path / "none.yml")
    every = write(family.config(route="all"), tmp_path / "every.yml")
    result = call("merge", none, tmp_path / "out", "--quiet")
    assert result.exit_code == 0, result.output
    result = call("merge", every, tmp_path / "out", "--quiet")
    assert result.exit_code == 1
    assert "--overwrite" in result.output
    assert read_manifest(tmp_path / "out").routed_layers == ()
    result = call("merge", every, tmp_path / "out", "--quiet", "--overwrite")
    assert result.exit_code == 0, result.output
    assert len(read_manifest(tmp_path / "out").routed_layers) == 5


def test_a_traceback_only_where_it_is_asked_for(family, tmp_path):
    config = write(family.config(densty=1), tmp_path / "config.yml")
    result = call("merge", config, tmp_path / "out")
    assert result.exit_code == 1
    assert "unknown parameter 'densty'" in result.output
    with pytest.raises(Exception, match="densty"):
        call("-v", "merge", config, tmp_path / "out")
    with pytest.raises(Exception, match="densty"):
        call("merge", config, tmp_path / "out", "-v")


def test_inspect_shows_experts_conflict_and_sizes(out):
    shown = figures("inspect", out)
    manifest = read_manifest(out)
    assert [expert["name"] for expert in shown["experts"]] == list(manifest.expert_names)
    for expert in shown["experts"]:
        file = out / f"mediator/experts/{expert['name']}.safetensors"
        assert expert["bytes"] == file.stat().st_size
        rate = 8 * expert["bytes"] / expert["routed_parameters"]
        assert expert["bits_per_parameter"] == pytest.approx(rate)
    assert [layer["routed"] for layer in shown["layers"]] == [False, False, True, False, True]
    assert "2 of 5 layers routed" in call("inspect", out).output


def test_a_fraction_takes_the_middle_layers_which_a_plan_knows_from_headers(family, tmp_path):
    config = write(family.config(routed_fraction=0.2), tmp_path / "config.yml")
    planned = figures("plan", config)["layers"]
    assert [layer["name"] for layer in planned if layer["routed"]] == ["1"]
    assert call("merge", config, tmp_path / "out", "--quiet").exit_code == 0
    assert [layer.name for layer in read_manifest(tmp_path / "out").routed_layers] == ["1"]
    reason = "1 of 5 layers routed: routed_fraction: 0.2, routed_by: place"
    assert reason in call("inspect", tmp_path / "out").output

    config = write(family.config(routed_fraction=0.2, conflict="sign"), tmp_path / "sign.yml")
    assert {layer["routed"] for layer in figures("plan", config)["layers"]} == {None}
    assert call("merge", config, tmp_path / "sign", "--quiet").exit_code == 0
    layers = read_manifest(tmp_path / "sign").layers
    (routed,) = [layer for layer in layers if layer.routed]
    assert routed.conflict["sign"] == max(layer.conflict["sign"] for layer in layers)
    assert "routed_by: sign" in call("inspect", tmp_path / "sign").output


def test_inspect_draws_what_it_shows(out, tmp_path):
    assert call("inspect", out, "--plot", tmp_path / "p.svg").exit_code == 0
    assert ">stored, kB</text>" in (tmp_path / "p.svg").read_text()
    stored = [layer["stored"] for layer in figures("inspect", out)["layers"]]
    assert set(stored[2]["bytes"]) == {"math", "code", "chat"}
    for name in ("math", "code", "chat"):
        file = out / f"mediator/experts/{name}.safetensors"
        assert 0 < sum(layer["bytes"][name] for layer in stored if layer) < file.stat().st_size


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("p.pdf", "FILE.png or FILE.svg is required, got 'p.pdf'"),
        ("nowhere/p.png", "nowhere: there is no such folder: make it first"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_at_once(out, path, message):
    result = call("inspect", out, "--plot", path)
    assert result.exit_code == 2
    assert message in result.output


def test_verify_accepts_the_artifact_of_a_merge(out):
    assert figures("verify", out) == {"files": len(read_manifest(out).files), "base_checked": True}


def test_verify_refuses_an_altered_file_by_name(out, tmp_path):
    import shutil

    copy = shutil.copytree(out, tmp_path / "copy")
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    result = call("verify", copy)
    assert result.exit_code == 1
    assert f"{copy}/model.safetensors: SHA-256" in result.output


def test_verify_refuses_another_base(out, family):
    result = call("verify", out, "--base", family.experts["math"])
    assert result.exit_code == 1
    assert "name the directory of the base of this artifact" in result.output


def test_a_directory_that_is_no_artifact_is_refused(family):
    for command in ("inspect", "verify"):
        result = call(command, family.base)
        assert result.exit_code == 1
        assert "is not a mediator artifact" in result.output


def test_generate_answers_every_prompt_and_says_how_it_was_routed(out):
    results = figures("generate", out, "w1 w2", "w3", "--max-new-tokens", 3)
    assert len(results) == 2
    assert [result["prompt"] for result in results] == ["w1 w2", "w3"]
    for result in results:
        assert 0 < len(result["mixture"]) <= 3
        assert set(result["mixture"]) <= {"math", "code", "chat"}
        assert 0 <= result["entropy"] <= math.log(3)
        assert 1 <= len(result["answer"].split()) <= 3


def test_generate_takes_a_mixture_instead_of_routing(out):
    (result,) = figures("generate", out, "w1", "--expert", "code", "--max-new-tokens", 2)
    assert result["mixture"] == {"code": 1.0}
    assert call("generate", out, "w1", "--expert", "code=much").exit_code == 2
    assert call("generate", out, "w1", "--expert", "law").exit_code == 1


def test_generate_follows_the_policy_that_is_given(out):
    (hard,) = figures("generate", out, "w1", "--policy", "hard", "--max-new-tokens", 1)
    (soft,) = figures("generate", out, "w1", "--policy", "soft", "--max-new-tokens", 1)
    assert list(hard["mixture"].values()) == [1.0]
    assert len(soft["mixture"]) == 3
    assert max(soft["mixture"], key=soft["mixture"].get) in hard["mixture"]


def test_generate_offers_every_policy_and_every_action():
    command = main.get_command(None, "generate")
    options = {option.name: option.type for option in command.params}
    assert tuple(options["policy"].choices) == get_args(Policy)
    assert tuple(options["ood_action"].choices) == get_args(OodAction)


def test_generate_asks_for_calibration_where_no_threshold_refuses_a_prompt(out):
    result = call("generate", out, "w1", "--ood-action", "refuse")
    assert result.exit_code == 1
    assert "run `mergekit-mediator calibrate`" in result.output


@pytest.mark.parametrize("options", [["--ood-action", "fallback"], ["--fallback", "code"]])
def test_a_fallback_is_named_and_used_or_neither(out, options):
    result = call("generate", out, "w1", *options)
    assert result.exit_code == 2
    assert "--ood-action fallback and --fallback NAME go together" in result.output


@pytest.mark.parametrize(
    ("text", "kind"), [("- a\n", "list"), ("just text", "str"), ("", "NoneType")]
)
def test_a_configuration_that_is_no_mapping_says_what_is_required(tmp_path, text, kind):
    path = tmp_path / "config.yml"
    path.write_text(text)
    result = call("plan", path)
    assert result.exit_code == 1
    message = "a mapping with merge_method, base_model and models is required, got "
    assert f"{path}: {message}{kind}" in result.output


def test_a_plan_refuses_configurations_that_the_merge_refuses(family, tmp_path):
    for settings, message in (({"budget": "1x"}, "budget: 1x is"), ({"densty": 1}, "densty")):
        result = call("plan", write(family.config(**settings), tmp_path / "config.yml"))
        assert result.exit_code == 1
        assert message in result.output


def test_counts_below_one_are_refused(out):
    assert call("generate", out, "w1", "--max-new-tokens", 0).exit_code == 2
    assert call("evaluate", out, "--task", "math=x.jsonl", "--limit", 0).exit_code == 2
    assert call("demo", "--prompts", 0).exit_code == 2


def test_two_files_for_one_expert_are_refused(out):
    result = call("calibrate", out, "--data", "math=a.jsonl", "--data", "math=b.jsonl")
    assert result.exit_code == 2
    assert "'math' is named twice" in result.output
