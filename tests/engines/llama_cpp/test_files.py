"""llama.cpp reads whole models of ours as transformers reads the checkpoints, and its converters write the same files."""

import json
import shutil

import byte_level
import gguf
import numpy as np
import pytest
import torch
import vllm_server
from families import make_family
from real_llama_cpp import SOURCES, convert, distance, serving
from transformers import AutoTokenizer

from mergekit_mediator.export.checkpoint import export_checkpoint
from mergekit_mediator.export.experts import StoredExperts
from mergekit_mediator.export.folder import export_adapters
from mergekit_mediator.export.gguf.folder import export_gguf_adapters, export_gguf_model
from mergekit_mediator.models.loading import load_plain

TEXTS = [
    *byte_level.TEXT,
    "abc   123 4567  \n\n x",
    "I'M sure WE'VE <|end|>done",
    "héllo wörld ÀÉ ß 北京 🚀🦙\t\t...",
]
MODELS = {
    "llama": (byte_level.llama, "smollm"),
    "llama3": (byte_level.llama3, "llama-bpe"),
    "llama_biased": (lambda: byte_level.llama(attention_bias=True, mlp_bias=True), "gpt-2"),
    "llama_scaled": (
        lambda: byte_level.llama(
            rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
        ),
        "gpt-2",
    ),
    "mistral": (byte_level.mistral, "gpt-2"),
    "qwen2": (byte_level.qwen2, "qwen2"),
    "qwen3": (byte_level.qwen3, "qwen2"),
}
DEMO = vllm_server.ROOT / "demo/mediator"
# What the converter writes and we do not, and the reverse: a label, the version of quantisations that no tensor has,
# and how texts begin and end, which llama.cpp otherwise takes from the name of the tokenizer.
MORE_OR_LESS = {
    *("general.name", "general.size_label", "general.quantization_version", "GGUF.tensor_count"),
    *("GGUF.kv_count", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token"),
}


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, tmp_path_factory):
    """The expert `math` of an artifact as a plain checkpoint and as our GGUF file, and the tokenizer's split."""
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_mediator.merge.run import run

    root = tmp_path_factory.mktemp(request.param)
    make, split = MODELS[request.param]
    family = byte_level.with_tokenizer(
        make_family(root / "family", make, dtype=torch.float32), split
    )
    config = MergeConfiguration.model_validate(family.config(route="all", density=0.5))
    run(config, str(root / "out"), MergeOptions(quiet=True))
    experts = StoredExperts(root / "out")
    export_checkpoint(experts, {"math": 1.0}, root / "plain")
    return root / "plain", export_gguf_model(experts, {"math": 1.0}, root / "gguf"), split


def test_the_server_predicts_and_splits_texts_as_transformers(checkpoint, tmp_path):
    plain, file, _ = checkpoint
    tokenizer, model = AutoTokenizer.from_pretrained(plain), load_plain(plain, "float32")
    worst = 0.0
    with serving(["llama-server", "-m", str(file)], tmp_path / "log") as address:
        for text in TEXTS:
            ids = tokenizer(text)["input_ids"]
            assert split_by(address, text) == ids
            worst = max(worst, distance(model, ids, address, []))
    print(f"{plain.parent.name}: log-probabilities differ by {worst:.4f} at most")
    assert worst < 0.02  # keys and values are float16 in llama.cpp's cache


def split_by(address, text):
    import httpx

    body = {"content": text, "add_special": True, "parse_special": True}
    return httpx.post(f"{address}/tokenize", json=body).json()["tokens"]


def test_the_converter_writes_the_same_model(checkpoint, tmp_path):
    plain, file, split = checkpoint
    # it knows real tokenizers by a digest of their tokens, and none of ours
    code = (
        f"import sys, runpy; sys.path[:0] = [{str(SOURCES)!r}, {str(SOURCES / 'gguf-py')!r}]\n"
        f"from conversion import base; base.TextModel.get_vocab_base_pre = lambda *_: {split!r}\n"
        f"runpy.run_path({str(SOURCES / 'convert_hf_to_gguf.py')!r}, run_name='__main__')"
    )
    script = tmp_path / "convert.py"
    script.write_text(code)
    convert(script, plain, "--outfile", tmp_path / "theirs.gguf", "--outtype", "f32")
    compare(file, tmp_path / "theirs.gguf")


def compare(ours, theirs):
    """Compare the tensors of two files bit for bit, and their fields."""
    ours, theirs = gguf.GGUFReader(ours), gguf.GGUFReader(theirs)
    tensors = [{t.name: t for t in file.tensors} for file in (ours, theirs)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        other = tensors[1][name]
        assert tensor.tensor_type == other.tensor_type, name
        if name == "rope_freqs.weight":  # two ways to compute them
            np.testing.assert_allclose(tensor.data, other.data, rtol=1e-5)
        else:
            assert np.array_equal(tensor.data, other.data), name
    fields = [{n: f.contents() for n, f in file.fields.items()} for file in (ours, theirs)]
    for name in fields[1].keys() - MORE_OR_LESS:
        if not name.startswith("general.") or name in ("general.architecture", "general.file_type"):
            assert fields[0].get(name) == fields[1][name], name


def test_the_converter_writes_the_same_adapters(tmp_path):
    experts = StoredExperts(DEMO)
    export_gguf_adapters(experts, tmp_path / "ours", 64)
    export_adapters(experts, tmp_path / "peft", 64, one_rank=True)
    kind = {torch.bfloat16: "bf16", torch.float32: "f32"}[
        experts.dense.weight(experts.weights[0]).dtype
    ]
    for name in experts.names:
        theirs = tmp_path / f"{name}.gguf"
        words = (tmp_path / "peft" / name, "--base", DEMO, "--outfile", theirs)
        convert("convert_lora_to_gguf.py", *words, "--outtype", kind)
        compare(tmp_path / f"ours/{name}.gguf", theirs)


def test_the_converter_knows_the_real_tokenizer_by_the_same_name(tmp_path):
    """The demo's tokenizer comes from a GGUF file, which loses that SmolLM2 splits numbers into digits."""
    artifact = shutil.copytree(DEMO, tmp_path / "artifact")
    path = artifact / "tokenizer.json"
    content = json.loads(path.read_text())
    assert content["pre_tokenizer"]["type"] == "ByteLevel"
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [digits, content["pre_tokenizer"]],
    }
    path.write_text(json.dumps(content))
    ours = export_gguf_model(StoredExperts(artifact), None, tmp_path / "ours")
    assert gguf.GGUFReader(ours).fields["tokenizer.ggml.pre"].contents() == "smollm"
    convert(
        "convert_hf_to_gguf.py", artifact, "--outfile", tmp_path / "t.gguf", "--outtype", "auto"
    )
    compare(ours, tmp_path / "t.gguf")
