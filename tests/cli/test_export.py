import json

import pytest
import torch
from adapters import train
from commands import call, figures
from peft import PeftModel
from transformers import AutoModelForCausalLM

from mergekit_mediator import MediatorModel
from mergekit_mediator.delta.kept import lost_of_left_out
from mergekit_mediator.export.adapter import read_peft
from mergekit_mediator.export.rank import AUTO_RANKS

IDS = torch.arange(4, 24)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def adapters(make, tmp_path):
    """An adapter whose modules have different ranks, and another one."""
    family = make(dtype=torch.float32)
    ranks = {"rank_pattern": {"down_proj": 1}, "alpha_pattern": {"down_proj": 2}}
    train(family.base, tmp_path / "a", 0, r=2)
    train(family.base, tmp_path / "b", 1, r=3, **ranks)
    models = [{"model": f"{family.base}+{tmp_path / n}", "parameters": {"expert": n}} for n in "ab"]
    return {"merge_method": "mediator", "base_model": str(family.base), "models": models}


@pytest.fixture(scope="module")
def out(family, tmp_path_factory):
    """An artifact of three full fine-tunes, all of whose weights changed."""
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_mediator.merge.run import run

    root = tmp_path_factory.mktemp("export") / "out"
    settings = family.config(route="all", bits=2.0, reference="base")
    run(MergeConfiguration.model_validate(settings), str(root), MergeOptions(quiet=True))
    return root


@pytest.mark.parametrize("reference", ["dense", "base"])
def test_exported_adapters_are_what_peft_adds_to_the_model(
    out, family, tmp_path, artifact, reference
):
    told = figures("export", artifact, tmp_path / "adapters", "--relative-to", reference)
    assert [expert["name"] for expert in told["experts"]] == ["math", "code", "chat"]
    assert all(expert["error"] == len(expert["dropped"]) == 0 for expert in told["experts"])
    manifest = json.loads((artifact / "mediator/manifest.json").read_text())
    root = {"dense": artifact, "base": manifest["base"]["source"]}[reference]
    served = MediatorModel.from_pretrained(artifact)
    for name in ("math", "code", "chat"):
        plain = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
        adapted = PeftModel.from_pretrained(plain, tmp_path / "adapters" / name)
        with served.mixture(name) as mixed:
            torch.testing.assert_close(logits(adapted), logits(mixed), rtol=1e-3, atol=1e-4)


def test_what_an_adapter_cannot_hold_is_counted(out, tmp_path):
    told = figures("export", out, tmp_path / "adapters", "--rank", "2", "--drop")
    for expert in told["experts"]:
        assert expert["rank"] == 2
        assert 0 < expert["error"] < 1
        assert len(expert["dropped"]) == 7  # two norms in each of three blocks, and the last one
        assert 0 < expert["dropped_part"] < 1
        files = (tmp_path / "adapters" / expert["name"]).glob("adapter_*")
        assert expert["bytes"] == sum(path.stat().st_size for path in files)
    text = call("export", out, tmp_path / "again", "--rank", "2", "--drop").output
    assert "left out by the rank, %" in text
    named = "model.layers.*.input_layernorm.weight (3), model.layers.*.post_attention_layernorm.weight (3)"
    said = f"leave out 7 weights, and the dense model's answer for every expert: {named}, model.norm.weight."
    assert said in text
    assert said in (tmp_path / "again/README.md").read_text()


def test_the_rank_of_each_expert_is_the_least_that_keeps_enough(out, tmp_path):
    folder = tmp_path / "adapters"
    part = 0.999
    dense = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    told = figures("export", out, folder, "--rank", f"auto:{part}", "--drop")["experts"]
    text = call("export", out, tmp_path / "again", "--rank", f"auto:{part}", "--drop").output
    for expert in told:
        choice, adapter = expert["choice"], read_peft(folder / expert["name"])
        changed = sum(float(dense[f"{m}.weight"].square().sum()) for m in adapter.modules)
        over_base = adapter.squared_norm / changed
        assert choice["keep"] == part
        lost = float(lost_of_left_out(expert["error"], over_base))
        assert choice["kept"] == pytest.approx(1 - lost, abs=1e-4)
        assert choice["kept"] >= part
        assert not choice["is_measured"]
        less = AUTO_RANKS[: AUTO_RANKS.index(choice["rank"])]
        for rank in less:
            arguments = ("--rank", str(rank), "--drop", "--expert", expert["name"])
            (fixed,) = figures("export", out, tmp_path / f"{rank}-{expert['name']}", *arguments)[
                "experts"
            ]
            assert 1 - lost_of_left_out(fixed["error"], over_base) < part
        said = f"{choice['rank']} (predicted to keep {choice['kept']:.2%})"
        assert f"{expert['name']} {said}" in text
        assert f"{expert['name']} {said}" in (folder / "README.md").read_text()
        card = (folder / expert["name"] / "README.md").read_text()
        assert f"| chosen by `--rank auto` | {said} |" in card
    assert any(expert["choice"]["rank"] > AUTO_RANKS[0] for expert in told)


def test_prompts_measure_what_a_rank_keeps(out, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"w{i} w{i + 9}"}) for i in range(6)))
    arguments = ("--drop", "--prompts", prompts, "--expert", "math")
    kept = {}
    for keep in (0.5, 0.9999):
        folder = tmp_path / f"{keep}"
        (expert,) = figures("export", out, folder, "--rank", f"auto:{keep}", *arguments)["experts"]
        assert expert["choice"]["is_measured"]
        assert expert["choice"]["kept"] >= keep
        kept[expert["choice"]["rank"]] = expert["choice"]["kept"]
    assert sorted(kept) == list(kept)
    assert len(kept) == 2
    assert (
        f"(measured to keep {expert['choice']['kept']:.2%})" in (folder / "README.md").read_text()
    )


def test_an_adapter_that_is_small_already_stays_exact(adapters, merged, tmp_path):
    out = merged({**adapters, "parameters": {"reference": "base"}})
    told = figures("export", out, tmp_path / "exported", "--rank", "auto", "--format", "vllm")
    assert [(e["rank"], e["error"], e["choice"]["rank"]) for e in told["experts"]] == [
        (2, 0.0, 8),
        (3, 0.0, 8),
    ]
    assert "--max-lora-rank 8 " in told["command"]


def test_the_mean_of_what_adapters_cannot_hold_is_baked_into_the_model_to_serve(
    out, tmp_path, read
):
    plain = figures("export", out, tmp_path / "plain", "--drop")
    folder = tmp_path / "adapters"
    told = figures("export", out, folder, "--bake-mean", "--format", "vllm")
    assert told["model"] == str(folder / "dense")
    assert f"vllm serve {folder}/dense --enable-lora" in told["command"]
    dense, baked = read(out), read(folder / "dense")
    left_out = set(told["experts"][0]["dropped"])
    served = MediatorModel.from_pretrained(out, dtype="float32")
    experts = []
    for name in ("math", "code", "chat"):
        with served.mixture(name) as mixed:
            experts.append({weight: mixed.state_dict()[weight].clone() for weight in left_out})
    for weight, values in baked.items():
        if weight in left_out:
            mean = torch.stack([expert[weight] for expert in experts]).mean(0)
            torch.testing.assert_close(values.float(), mean, rtol=2**-7, atol=1e-3)
            assert not torch.equal(values, dense[weight])
        else:
            assert torch.equal(values, dense[weight])
    for before, after in zip(plain["experts"], told["experts"], strict=True):
        assert 0 < after["dropped_part"] < before["dropped_part"]
    card = (folder / "README.md").read_text()
    assert "to be added to the checkpoint in `dense`" in card
    assert "leave out 7 weights, and the mean of the experts' answer for every expert" in card
    assert str(tmp_path) not in card
    config = json.loads((folder / "math/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "dense")


def test_the_baked_model_and_an_adapter_are_nearer_to_the_expert(out, tmp_path):
    for name, options in (("plain", ["--drop"]), ("baked", ["--bake-mean"])):
        figures("export", out, tmp_path / name, *options)
    served = MediatorModel.from_pretrained(out, dtype="float32")
    errors = {}
    for root in (out, tmp_path / "baked/dense"):
        folder = tmp_path / ("plain" if root == out else "baked")
        distance = 0.0
        for name in ("math", "code", "chat"):
            plain = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
            adapted = PeftModel.from_pretrained(plain, folder / name)
            with served.mixture(name) as mixed:
                distance += float((logits(adapted) - logits(mixed)).square().mean())
        errors[folder.name] = distance
    assert errors["baked"] < errors["plain"]


def test_embeddings_that_an_engine_refuses_are_left_out_named_and_baked(out, tmp_path, read):
    folder = tmp_path / "adapters"
    told = figures("export", out, folder, "--no-embeddings", "--bake-mean")
    for expert in told["experts"]:
        assert not {"embed_tokens", "lm_head"} & set(expert["modules"])
        assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(expert["dropped"])
    dense, baked = read(out), read(folder / "dense")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert not torch.equal(baked[name], dense[name])
    card = (folder / "README.md").read_text()
    assert "leave out 9 weights" in card
    assert "model.embed_tokens.weight" in card


def test_the_mean_of_the_experts_that_are_exported_is_baked(out, tmp_path, read):
    figures("export", out, tmp_path / "one", "--bake-mean", "--expert", "code")
    served = MediatorModel.from_pretrained(out)
    with served.mixture("code") as mixed:
        expected = mixed.state_dict()["model.norm.weight"]
        assert torch.equal(read(tmp_path / "one/dense")["model.norm.weight"], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--relative-to", "base"],
            "adapters relative to dense are required, got relative to base",
        ),
        (["--format", "checkpoint", "--expert", "math"], "--bake-mean belongs to adapters"),
        (["--expert", "law"], "unknown expert 'law'; this artifact has math, code, chat"),
    ],
)
def test_a_mean_that_cannot_be_baked_is_refused_and_leaves_nothing(out, tmp_path, options, message):
    result = call("export", out, tmp_path / "adapters", "--bake-mean", *options)
    assert result.exit_code != 0
    assert message in result.output
    assert list(tmp_path.iterdir()) == []


def test_an_expert_called_dense_has_no_folder_beside_the_baked_model(make, merged, tmp_path):
    family = make(experts=("dense", "code"))
    out = merged(family.config(route="all", bits=2.0))
    result = call("export", out, tmp_path / "adapters", "--bake-mean")
    assert result.exit_code == 1
    assert "expert 'dense': the folder of this name is for the dense checkpoint" in result.output
    assert not (tmp_path / "adapters").exists()


def test_a_part_of_the_change_chooses_the_rank_of_every_module(out, tmp_path):
    folder = tmp_path / "adapters"
    told = figures("export", out, folder, "--rank", "0.9", "--drop", "--expert", "math")
    (expert,) = told["experts"]
    assert 0.01 < expert["error"] <= 0.1
    exact = figures("export", out, tmp_path / "exact", "--drop", "--expert", "math")["experts"][0]
    assert 1 < expert["rank"] < exact["rank"]


def test_the_card_of_an_adapter_says_what_it_leaves_out(out, tmp_path):
    told = figures("export", out, tmp_path / "adapters", "--rank", "2", "--drop")
    text = (tmp_path / "adapters/code/README.md").read_text()
    expert = told["experts"][1]
    assert f"| squared change that the rank leaves out | {expert['error']:.4%} |" in text
    assert "| changed weights that the adapter lacks | 7 |" in text
    assert text.count("layernorm.weight`") == 6
    assert str(tmp_path) not in text


def test_answers_on_prompts_are_compared_in_table_and_figures(out, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"w{i} w{i + 1}"}) for i in range(5)))
    arguments = ("--rank", "2", "--drop", "--expert", "math", "--prompts", prompts)
    (expert,) = figures("export", out, tmp_path / "a", *arguments)["experts"]
    assert expert["answers"]["divergence"] > 0
    assert "KL of answers, nats" in call("export", out, tmp_path / "b", *arguments).output


def test_the_start_command_of_an_engine_names_rank_modules_and_adapters(out, tmp_path):
    folder = tmp_path / "adapters"
    command = figures("export", out, folder, "--format", "vllm", "--rank", "9", "--drop")["command"]
    assert f"vllm serve {out} --enable-lora --max-loras 4 --max-lora-rank 16" in command
    assert f"math={folder}/math code={folder}/code chat={folder}/chat" in command
    other = figures(
        "export", out, tmp_path / "b", "--format", "sglang", "--expert", "code", "--drop"
    )
    assert "--max-lora-rank 16" in other["command"]
    assert "--lora-target-modules down_proj embed_tokens" in other["command"]
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"code", "README.md"}


def test_an_expert_that_is_named_twice_is_exported_once(out, tmp_path):
    told = figures("export", out, tmp_path / "a", "--drop", "--expert", "code", "--expert", "code")
    assert [expert["name"] for expert in told["experts"]] == ["code"]


def test_llama_cpp_is_told_to_convert_and_to_start_with_all_adapters_off(out, tmp_path):
    folder = tmp_path / "adapters"
    command = figures("export", out, folder, "--format", "llama.cpp", "--drop")["command"]
    *conversions, server = command.splitlines()
    assert len(conversions) == 4
    assert f"convert_lora_to_gguf.py {folder}/code --base {out}" in conversions[2]
    files = ",".join(f"{folder}/{name}.gguf" for name in ("math", "code", "chat"))
    assert f"--lora {files} --lora-init-without-apply --cache-ram 0" in server


@pytest.mark.parametrize("engine", ["sglang", "llama.cpp"])
def test_engines_that_know_one_rank_get_the_same_adapters_of_one_rank(
    adapters, merged, tmp_path, engine
):
    out = merged({**adapters, "parameters": {"reference": "base"}})
    plain, padded = tmp_path / "plain", tmp_path / "padded"
    figures("export", out, plain)
    figures("export", out, padded, "--format", engine)
    config = json.loads((padded / "b/adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (3, {})
    models = []
    for folder in (plain, padded):
        dense = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        models.append(PeftModel.from_pretrained(dense, folder / "b"))
    torch.testing.assert_close(logits(models[0]), logits(models[1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--expert", "law"], "unknown expert 'law'; this artifact has math, code, chat"),
        (
            ["--rank", "0"],
            "a rank such as 64, a part of the squared change such as 0.99, or `auto` (or `auto:0.99`, with the part",
        ),
        (["--rank", "1.5"], "of the gain to keep) is required, got '1.5'"),
        (["--rank", "much"], "of the gain to keep) is required, got 'much'"),
        (["--rank", "auto:2"], "of the gain to keep) is required, got 'auto:2'"),
        (
            [],
            "'math': it changes 7 weights that are no matrices of linear layers or embeddings, which alone a",
        ),
        (
            ["--format", "vllm"],
            "of its squared change: leave them out with --drop, or export a checkpoint",
        ),
        (["--format", "peft-shira", "--relative-to", "base"], "relative to dense required"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(out, tmp_path, options, message):
    result = call("export", out, tmp_path / "adapters", *options)
    assert result.exit_code != 0
    assert message in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty_stays_as_it_is(out, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = call("export", out, tmp_path)
    assert result.exit_code == 1
    assert "is not empty: choose another folder" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_artifact_that_does_not_verify_is_not_exported(artifact, tmp_path):
    import shutil

    damaged = shutil.copytree(artifact, tmp_path / "damaged")
    (damaged / "mediator/experts/math.safetensors").write_bytes(b"")
    result = call("export", damaged, tmp_path / "adapters")
    assert result.exit_code == 1
    assert "math.safetensors" in result.output


def test_a_checkpoint_of_a_blend_is_the_model_that_is_served(out, tmp_path):
    experts = ["--expert", "math=0.25", "--expert", "chat=0.75"]
    result = figures("export", out, tmp_path / "plain", "--format", "checkpoint", *experts)
    assert result["mixture"] == {"math": 0.25, "chat": 0.75}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    served = MediatorModel.from_pretrained(out).forward(IDS, mixture=result["mixture"]).logits
    assert torch.equal(logits(plain), served)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--format checkpoint needs --expert NAME: one of math, code, chat"),
        (["--expert", "law"], "unknown expert 'law'; this artifact has math, code, chat"),
        (["--expert", "math=much"], "NAME or NAME=WEIGHT is required, got 'math=much'"),
    ],
)
def test_a_checkpoint_of_no_expert_is_refused(out, tmp_path, arguments, message):
    result = call("export", out, tmp_path / "plain", "--format", "checkpoint", *arguments)
    assert result.exit_code != 0
    assert message in result.output
    assert not (tmp_path / "plain").exists()
