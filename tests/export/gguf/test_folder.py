"""GGUF files read back by the package `gguf` and by transformers; a real llama.cpp reads them in `tests/engines/llama_cpp`."""

import resource
import sys

import byte_level
import gguf
import numpy as np
import pico
import pytest
import torch
from adapters import train
from families import make_family
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mergekit_mediator import MediatorModel
from mergekit_mediator.errors import ExportError
from mergekit_mediator.export.experts import StoredExperts
from mergekit_mediator.export.gguf import folder as gguf_folder
from mergekit_mediator.export.gguf.folder import export_gguf_adapters, export_gguf_model
from mergekit_mediator.export.gguf.layout import NotInGgufError

IDS = torch.arange(3, 60)[None]
# a model's constructor, and its tokenizer
MODELS = {
    "llama": (byte_level.llama, "smollm"),
    "llama3": (byte_level.llama3, "llama-bpe"),
    "mistral": (byte_level.mistral, "gpt-2"),
    "qwen2": (byte_level.qwen2, "qwen2"),
    "qwen3": (byte_level.qwen3, "qwen2"),
}
STORED = {"route": "all", "density": 0.5}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Gives the artifact of full fine-tunes of an architecture in a dtype; made once."""
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_mediator.merge.run import run

    made = {}

    def artifact(name, dtype=torch.float32):
        if (name, dtype) not in made:
            root = tmp_path_factory.mktemp(name)
            make, split = MODELS[name]
            family = byte_level.with_tokenizer(
                make_family(root / "family", make, dtype=dtype), split
            )
            config = MergeConfiguration.model_validate(family.config(**STORED))
            run(config, str(root / "out"), MergeOptions(quiet=True))
            made[name, dtype] = root / "out"
        return made[name, dtype]

    return artifact


def tensors(path):
    """The tensors of a file by name, float32, and its fields."""
    reader = gguf.GGUFReader(path)
    values = {}
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        dense = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        values[tensor.name] = torch.from_numpy(np.array(dense, dtype=np.float32)).reshape(shape)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return values, fields


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_a_file_as_the_expert_that_is_served(artifacts, tmp_path, name, dtype):
    out = artifacts(name, dtype)
    path = export_gguf_model(StoredExperts(out), {"math": 1.0}, tmp_path / "gguf")
    # of Qwen3 and Mistral, transformers 5.24 does not read the size of heads from a GGUF file
    config = {"config": AutoConfig.from_pretrained(out)} if name == "qwen3" else {}
    plain = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, **config
    )
    served = MediatorModel.from_pretrained(out, dtype="float32")
    expected = MediatorModel.from_pretrained(out).model.state_dict()
    with torch.no_grad(), served.mixture("math") as mixed:
        assert plain.state_dict().keys() == expected.keys()
        logits = plain(IDS).logits
        torch.testing.assert_close(logits, mixed(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama3", "mistral", "qwen2", "qwen3"])
def test_a_file_holds_each_weight_bit_for_bit_in_the_order_of_llama_cpp(artifacts, tmp_path, name):
    out = artifacts(name, torch.bfloat16)
    path = export_gguf_model(StoredExperts(out), {"math": 0.25, "chat": 0.75}, tmp_path / "gguf")
    assert path.name == "math=0.25+chat=0.75.gguf"
    values, fields = tensors(path)
    is_llama = fields["general.architecture"] == "llama"
    assert is_llama == (name not in ("qwen2", "qwen3"))
    with MediatorModel.from_pretrained(out).mixture({"math": 0.25, "chat": 0.75}) as mixed:
        weights = {n: w.float() for n, w in mixed.state_dict().items()}
    if fields[f"{fields['general.architecture']}.block_count"] and name.startswith("qwen"):
        weights.pop("lm_head.weight")  # tied
    places = {"q_proj": ("attn_q", 4), "k_proj": ("attn_k", 2)}
    for weight, expected in weights.items():
        module = weight.split(".")[-2]
        if module in places and is_llama:
            place, heads = places[module]
            stored = values.pop(f"blk.{weight.split('.')[2]}.{place}.weight")
            assert torch.equal(stored, interleaved(expected, heads))
        else:
            match = [n for n, v in values.items() if v.shape == expected.shape]
            same = [n for n in match if torch.equal(values[n], expected)]
            assert len(same) == 1, weight
            values.pop(same[0])
    assert set(values) == ({"rope_freqs.weight"} if name == "llama3" else set())


def interleaved(weight, heads):
    """The rows of each head as llama.cpp turns them: i and i + d/2 become neighbours."""
    size = len(weight) // heads
    rows = [
        h * size + i + half * (size // 2)
        for h in range(heads)
        for i in range(size // 2)
        for half in (0, 1)
    ]
    return weight[rows]


def test_long_waves_of_llama_3_turn_more_slowly(artifacts, tmp_path):
    out = artifacts("llama3")
    path = export_gguf_model(StoredExperts(out), None, tmp_path / "gguf")
    factors = tensors(path)[0]["rope_freqs.weight"]
    config = AutoConfig.from_pretrained(out)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    plain = 1 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    torch.testing.assert_close(plain / factors, scaled)


@pytest.mark.parametrize("split", byte_level.SPLITS)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_tokenizer_is_in_the_file(artifacts, tmp_path, split, adds_bos):
    import shutil

    out = shutil.copytree(artifacts("llama"), tmp_path / "out")
    byte_level.tokenizer(split, adds_bos).save_pretrained(out)
    path = export_gguf_model(StoredExperts(out), None, tmp_path / "gguf")
    _, fields = tensors(path)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert fields["tokenizer.ggml.pre"] == split
    assert fields["tokenizer.ggml.add_bos_token"] == adds_bos
    assert not fields["tokenizer.ggml.add_eos_token"]
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    numbers = [fields[f"tokenizer.ggml.{role}_token_id"] for role in ("padding", "bos", "eos")]
    assert numbers == [0, 1, 2]
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == byte_level.VOCABULARY
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert kinds[:4] == [3, 3, 3, 1]
    assert (tokens[-1], kinds[-1]) == ("[PAD319]", 5)
    back = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert back.get_vocab().items() >= tokenizer.get_vocab().items()


@pytest.fixture(params=["llama", "qwen3"])
def adapted(request, make, merged, tmp_path):
    """An artifact of two adapters of different ranks and modules, untied, in float32."""
    makers = {"llama": byte_level.llama, "qwen3": lambda: byte_level.qwen3(tied=False)}
    family = byte_level.with_tokenizer(make(makers[request.param], dtype=torch.float32, experts=()))
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
    train(family.base, tmp_path / "a", 0, r=2, target_modules=modules)
    train(family.base, tmp_path / "b", 1, r=3, target_modules=["q_proj", "gate_proj", "lm_head"])
    models = [{"model": f"{family.base}+{tmp_path / n}", "parameters": {"expert": n}} for n in "ab"]
    return merged({"merge_method": "mediator", "base_model": str(family.base), "models": models})


@pytest.mark.parametrize("reference", ["dense", "base"])
def test_an_adapter_turns_the_dense_file_into_that_of_the_expert(adapted, tmp_path, reference):
    experts = StoredExperts(adapted, reference)
    exported = export_gguf_adapters(experts, tmp_path / "lora", 64)
    assert [expert.rank for expert in exported] == ({"dense": [5, 5], "base": [2, 3]}[reference])
    dense, _ = tensors(export_gguf_model(StoredExperts(adapted), None, tmp_path / "dense"))
    for name in "ab":
        whole, _ = tensors(
            export_gguf_model(StoredExperts(adapted), {name: 1.0}, tmp_path / f"whole-{name}")
        )
        factors, fields = tensors(tmp_path / f"lora/{name}.gguf")
        kind = [fields[f"general.{x}"] for x in ("type", "architecture")] + [fields["adapter.type"]]
        assert kind in (["adapter", "llama", "lora"], ["adapter", "qwen3", "lora"])
        ranks = {min(factor.shape) for factor in factors.values()}
        assert ranks == {int(fields["adapter.lora.alpha"])}
        changed = {weight.rpartition(".")[0] for weight in factors}
        if reference == "dense":
            assert changed == {w for w in whole if not torch.equal(whole[w], dense[w])}
            assert_same(with_change(dense, factors), whole)


def with_change(dense, factors):
    """A model with an adapter added, as llama.cpp adds it: b · a[token] for the embedding, else b · (a · input)."""
    changed = dict(dense)
    for weight in {name.rpartition(".")[0] for name in factors}:
        a, b = factors[f"{weight}.lora_a"], factors[f"{weight}.lora_b"]
        changed[weight] = dense[weight] + (a @ b.T if weight == "token_embd.weight" else b @ a)
    return changed


def assert_same(some, others):
    assert some.keys() == others.keys()
    for name, values in some.items():
        torch.testing.assert_close(values, others[name], rtol=1e-4, atol=1e-5)


def test_what_a_gguf_adapter_cannot_hold_is_named_counted_and_refused(artifacts, tmp_path):
    experts = StoredExperts(artifacts("qwen3"))
    with pytest.raises(
        ExportError,
        match=r"'math': it changes 14 weights that are no matrices .* a GGUF adapter holds beside an embedding "
        r"that is not also the head \(model.embed_tokens.weight, .*: leave them out with --drop",
    ):
        export_gguf_adapters(experts, tmp_path / "lora", 64)
    assert not (tmp_path / "lora").exists()
    exported = export_gguf_adapters(experts, tmp_path / "lora", 64, drop=True)
    assert len(exported[0].dropped) == 14
    assert not any("token_embd" in name for name in tensors(tmp_path / "lora/math.gguf")[0])


def test_an_adapter_of_full_rank_is_the_expert_but_for_its_norms(artifacts, tmp_path):
    experts = StoredExperts(artifacts("llama"))
    exported = export_gguf_adapters(experts, tmp_path / "lora", 64, drop=True)
    assert {len(expert.dropped) for expert in exported} == {7}
    assert {"embed_tokens", "lm_head"} <= set(exported[0].modules)
    dense, _ = tensors(export_gguf_model(experts, None, tmp_path / "dense"))
    whole, _ = tensors(export_gguf_model(experts, {"code": 1.0}, tmp_path / "code"))
    whole |= {name: values for name, values in dense.items() if "norm" in name}
    assert_same(with_change(dense, tensors(tmp_path / "lora/code.gguf")[0]), whole)


def test_the_mean_of_the_experts_is_baked_where_adapters_hold_nothing(artifacts, tmp_path):
    out = artifacts("llama", torch.float32)
    export_gguf_adapters(StoredExperts(out), tmp_path / "lora", 64, with_model=True, bake_mean=True)
    baked, _ = tensors(tmp_path / "lora/dense.gguf")
    dense, _ = tensors(export_gguf_model(StoredExperts(out), None, tmp_path / "dense"))
    thirds = dict.fromkeys(("math", "code", "chat"), 1 / 3)
    mean, _ = tensors(export_gguf_model(StoredExperts(out), thirds, tmp_path / "mean"))
    for name, values in baked.items():
        assert torch.equal(values, (mean if "norm" in name else dense)[name])
    assert "the checkpoint in `dense.gguf`" in (tmp_path / "lora/README.md").read_text()


@pytest.mark.parametrize(
    ("make_model", "options", "message"),
    [
        (pico.gpt2, {}, "GPT2LMHeadModel: this package writes GGUF for LlamaForCausalLM"),
        (pico.gemma3, {}, "gemma3: this package writes adapters of it, and no whole model"),
        (pico.llama, {}, "tokenizer.json: byte-level BPE that splits text as gpt-2, smollm, qwen2"),
        (
            lambda: byte_level.llama(
                rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
            ),
            {},
            "rope_parameters: default, linear, llama3 is required, got",
        ),
        (
            lambda: byte_level.llama(hidden_act="gelu"),
            {},
            "hidden_act: silu is required, got gelu",
        ),
    ],
    ids=["gpt2", "gemma3", "tokenizer", "rope", "activation"],
)
def test_models_that_are_not_known_are_refused_with_the_command_of_llama_cpp(
    make, merged, tmp_path, make_model, options, message
):
    out = merged(make(make_model).config(**STORED))
    with pytest.raises(NotInGgufError) as refusal:
        export_gguf_model(StoredExperts(out), None, tmp_path / "gguf")
    assert message in str(refusal.value)
    assert "--format checkpoint" in str(refusal.value)
    assert "convert_hf_to_gguf.py" in str(refusal.value)
    assert not (tmp_path / "gguf").exists()
    assert gguf_folder.is_written(out) is False


def test_gemma_has_adapters(make, merged, tmp_path):
    out = merged(make(pico.gemma3).config(**STORED))
    export_gguf_adapters(StoredExperts(out), tmp_path / "lora", 4, drop=True)
    values, fields = tensors(tmp_path / "lora/math.gguf")
    assert fields["general.architecture"] == "gemma3"
    assert "blk.2.ffn_down.weight.lora_a" in values


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank: at least 1 is required, got 0"),
        ({"rank": 4, "names": ["law"]}, "unknown expert 'law'; this artifact has math, code, chat"),
    ],
)
def test_bad_requests_leave_nothing(artifacts, tmp_path, arguments, message):
    with pytest.raises(ExportError, match=message):
        export_gguf_adapters(StoredExperts(artifacts("llama")), tmp_path / "x", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_whole_model_of_an_unknown_expert_or_of_the_base_is_refused(artifacts, tmp_path):
    out = artifacts("llama")
    with pytest.raises(ExportError, match="unknown expert 'law'"):
        export_gguf_model(StoredExperts(out), {"law": 1.0}, tmp_path / "x")
    experts = StoredExperts(out)
    experts.reference = "base"
    with pytest.raises(ExportError, match="relative to dense required"):
        export_gguf_model(experts, None, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("largest", [2000, 30_000])
def test_a_full_disk_leaves_nothing(artifacts, tmp_path, largest):
    experts = StoredExperts(artifacts("llama"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))
    try:
        with pytest.raises(ExportError, match="cannot be written"):
            export_gguf_model(experts, None, tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_gguf_the_error_names_the_extra(artifacts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ExportError, match=r"pip install 'mergekit-mediator\[gguf\]'"):
        export_gguf_model(StoredExperts(artifacts("llama")), None, tmp_path / "x")
