import json

import byte_level
import gguf
import pico
import pytest
import torch
from commands import call, figures
from families import make_family


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """An artifact of three full fine-tunes of a model that llama.cpp knows."""
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_mediator.merge.run import run

    root = tmp_path_factory.mktemp("gguf")
    family = make_family(root / "family", byte_level.llama, dtype=torch.bfloat16)
    settings = byte_level.with_tokenizer(family).config(route="all", bits=2.0, reference="base")
    run(MergeConfiguration.model_validate(settings), str(root / "out"), MergeOptions(quiet=True))
    return root / "out"


def fields(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("experts", "file"),
    [
        ([], "dense.gguf"),
        (["--expert", "code"], "code.gguf"),
        (["--expert", "code=0.5", "--expert", "math=0.25"], "code=0.5+math=0.25.gguf"),
    ],
)
def test_one_file_holds_one_model(out, tmp_path, experts, file):
    told = figures("export", out, tmp_path / "x", "--format", "gguf", *experts)
    assert told["path"] == str(tmp_path / "x" / file)
    assert names(tmp_path / "x") == {file}
    assert told["bytes"] == (tmp_path / "x" / file).stat().st_size
    about = fields(tmp_path / "x" / file)
    assert about["general.type"] == "model"
    assert about["general.name"] == f"out {file.removesuffix('.gguf')}"
    text = call("export", out, tmp_path / "y", "--format", "gguf", *experts).output
    assert "a plain model of" in text
    assert "for llama.cpp" in text


@pytest.mark.parametrize("reference", ["dense", "base"])
def test_adapters_are_one_file_each_with_a_card_of_all(out, tmp_path, reference):
    folder = tmp_path / "lora"
    options = ("--rank", "3", "--drop", "--relative-to", reference)
    told = figures("export", out, folder, "--format", "gguf-lora", *options)
    assert names(folder) == {"math.gguf", "code.gguf", "chat.gguf", "README.md"}
    assert told["command"] is None
    for expert in told["experts"]:
        about = fields(folder / f"{expert['name']}.gguf")
        assert about["adapter.lora.alpha"] == expert["rank"] == 3
        assert about["general.name"] == expert["name"]
        assert len(expert["dropped"]) == 7
    card = (folder / "README.md").read_text()
    assert "Each GGUF file is an adapter of one expert" in card
    assert "leave out 7 weights" in card
    assert str(tmp_path) not in card


def test_llama_cpp_gets_model_adapters_and_one_command(out, tmp_path):
    folder = tmp_path / "files"
    told = figures("export", out, folder, "--format", "llama.cpp", "--drop", "--expert", "code")
    assert names(folder) == {"dense.gguf", "code.gguf", "README.md"}
    assert told["model"] == str(folder / "dense.gguf")
    assert told["command"] == (
        f"llama-server -m {folder}/dense.gguf --lora {folder}/code.gguf --lora-init-without-apply --cache-ram 0"
    )
    assert fields(folder / "dense.gguf")["general.type"] == "model"


def test_relative_to_the_base_the_base_is_converted_by_llama_cpp(out, tmp_path):
    folder = tmp_path / "files"
    options = ("--drop", "--relative-to", "base")
    command = figures("export", out, folder, "--format", "llama.cpp", *options)["command"]
    conversion, server = command.splitlines()
    base = json.loads((out / "mediator/manifest.json").read_text())["base"]["source"]
    assert conversion == f"python convert_hf_to_gguf.py {base} --outfile {folder}/base.gguf"
    assert f"llama-server -m {folder}/base.gguf --lora {folder}/math.gguf," in server


def test_answers_on_prompts_are_compared(out, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"The {n} cats"}) for n in range(5)))
    options = ("--format", "gguf-lora", "--drop", "--rank", "2", "--expert", "math")
    (expert,) = figures("export", out, tmp_path / "x", *options, "--prompts", prompts)["experts"]
    assert expert["answers"]["divergence"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["gguf", "--expert", "law"], "unknown expert 'law'; this artifact has math, code, chat"),
        (["gguf", "--expert", "math=much"], "NAME or NAME=WEIGHT is required, got 'math=much'"),
        (["gguf", "--bake-mean"], "--bake-mean belongs to adapters: leave it out, a gguf holds"),
        (["gguf", "--relative-to", "base"], "relative to dense required"),
        (["gguf-lora", "--expert", "law"], "unknown expert 'law'"),
        (["gguf-lora", "--rank", "0"], "a rank such as 64, a part of the squared change"),
        (["gguf-lora"], "'math': it changes 7 weights that are no matrices of linear layers"),
        (["gguf-lora", "--bake-mean"], "gguf-lora writes none: use --format llama.cpp"),
        (
            ["llama.cpp", "--bake-mean", "--relative-to", "base"],
            "adapters relative to dense are required, got relative to base",
        ),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(out, tmp_path, options, message):
    result = call("export", out, tmp_path / "x", "--format", *options)
    assert result.exit_code != 0
    assert message in result.output
    assert list(tmp_path.iterdir()) == []


def test_an_expert_called_dense_is_refused_beside_the_dense_file(make, merged, tmp_path):
    family = byte_level.with_tokenizer(make(byte_level.llama, experts=("dense", "code")))
    out = merged(family.config(route="all", bits=2.0))
    result = call("export", out, tmp_path / "x", "--format", "llama.cpp", "--drop")
    assert result.exit_code == 1
    assert "the file of this name is for the dense expert" in result.output


@pytest.mark.parametrize("form", ["gguf", "gguf-lora"])
def test_an_unknown_architecture_is_refused_in_one_line(make, merged, tmp_path, form):
    out = merged(make(pico.gpt2).config(route="all", bits=2.0))
    result = call("export", out, tmp_path / "x", "--format", form, "--drop")
    assert result.exit_code == 1
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error")]
    assert "GPT2LMHeadModel: this package writes GGUF for LlamaForCausalLM" in line
    assert "--format checkpoint" in line
    assert not (tmp_path / "x").exists()
