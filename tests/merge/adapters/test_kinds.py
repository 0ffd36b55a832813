"""Adapters of every kind answer as PEFT's own forward pass, and what is none is refused in one line."""

import json
import re
from pathlib import Path

import peft
import pico
import pytest
import torch
from adapter_kinds import GPT2, LLAMA, TIED, WHOLE, logits, lora, save
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mergekit_mediator.errors import InputError
from mergekit_mediator.merge.adapters.config import kind_of
from mergekit_mediator.merge.adapters.loader import ONE_BY_ONE, AdapterLoader, open_adapted

PAGE = Path(__file__).parents[3] / "docs/adapters.md"
BASES = {
    "llama": (pico.llama, LLAMA | WHOLE),
    "tied": (pico.llama_tied, TIED),
    "gpt2": (pico.gpt2, GPT2),
}


@pytest.fixture(scope="module")
def bases(make):
    """A base model in float32 of each architecture."""
    kinds = {**BASES, "moe": (pico.qwen3_moe, {})}
    return {n: make(m, dtype=torch.float32, experts=()).base for n, (m, _) in kinds.items()}


def reference(base, adapter):
    return ModelReference.model_validate(f"{base}+{adapter}")


def opened(base, adapter, cache):
    return open_adapted(reference(base, adapter), MergeOptions(lora_merge_cache=str(cache)))


def answer(loader, base):
    """The logits of the base with the weights that a loader reads."""
    model = AutoModelForCausalLM.from_pretrained(base)
    state = model.state_dict()
    with torch.no_grad():
        for name in loader.index.tensor_paths:
            state[name].copy_(loader.get_tensor(name))
    return logits(model)


def check(base, config, tmp_path):
    expected = save(base, tmp_path / "adapter", config)
    assert float((expected - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max()) > 1e-4
    loader = opened(base, tmp_path / "adapter", tmp_path / "cache")
    for _ in range(2):  # the passes of a merge read a weight more than once
        torch.testing.assert_close(answer(loader, base), expected, rtol=1e-5, atol=1e-5)
    return loader


@pytest.mark.parametrize("kind", LLAMA)
def test_an_adapter_answers_as_peft_does_without_a_merged_model(bases, tmp_path, kind):
    loader = check(bases["llama"], LLAMA[kind], tmp_path)
    assert isinstance(loader, AdapterLoader)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kind", WHOLE)
def test_an_adapter_that_needs_the_whole_base_is_merged_by_peft(bases, tmp_path, kind, caplog):
    check(bases["llama"], WHOLE[kind], tmp_path)
    (merged,) = (tmp_path / "cache").iterdir()
    assert f"into a whole model: {merged}, " in caplog.text


@pytest.mark.parametrize("kind", GPT2)
def test_biases_and_transposed_matrices_answer_as_peft_does(bases, tmp_path, kind):
    assert isinstance(check(bases["gpt2"], GPT2[kind], tmp_path), AdapterLoader)


@pytest.mark.parametrize("kind", TIED)
def test_one_change_of_tied_embeddings_answers_as_peft_does(bases, tmp_path, kind):
    assert isinstance(check(bases["tied"], TIED[kind], tmp_path), AdapterLoader)


@pytest.mark.parametrize(
    "config",
    [
        lora("embed_tokens", "q_proj"),
        lora("lm_head", "q_proj"),
        lora("embed_tokens", "lm_head"),
        lora(modules_to_save=["lm_head"]),
        lora(modules_to_save=["embed_tokens"]),
        peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
    ],
    ids=range(6),
)
def test_a_change_of_one_of_two_tied_weights_is_refused(bases, tmp_path, config):
    save(bases["tied"], tmp_path / "adapter", config)
    with pytest.raises(InputError, match=r"one weight \(tie_word_embeddings\), got a change of"):
        opened(bases["tied"], tmp_path / "adapter", tmp_path / "cache")


def test_parameters_that_join_experts_are_merged_by_peft(bases, tmp_path):
    base = bases["moe"]
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(target_modules=[], target_parameters=targets, r=2)
    expected = save(base, tmp_path / "adapter", config)
    opened(base, tmp_path / "adapter", tmp_path / "cache")
    (merged,) = (tmp_path / "cache").iterdir()
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(merged)), expected, rtol=1e-5, atol=1e-5
    )


def test_every_kind_that_is_merged_one_by_one_is_compared_with_peft():
    tested = {kind_of(c) for group in (LLAMA, GPT2, TIED) for c in group.values()}
    assert tested == ONE_BY_ONE


def test_the_table_of_the_documents_has_every_kind_that_is_compared():
    rows = re.findall(r"^\| (.+) \| (module by module|PEFT merges).* \|$", PAGE.read_text(), re.M)
    table = {(kind, how) for kinds, how in rows for kind in kinds.split(", ")}
    one_by_one = {(kind, "module by module") for kind in LLAMA | GPT2 | TIED}
    assert table == one_by_one | {(kind, "PEFT merges") for kind in WHOLE}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PROMPT_TUNING"),
        (peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PREFIX_TUNING"),
        (lora("q_proj", lora_bias=True), "base layer has no bias"),
        (
            lora(alora_invocation_tokens=[5], task_type="CAUSAL_LM"),
            "aLoRA does not support merging",
        ),
        (peft.LilyConfig(target_modules=["q_proj", "down_proj"], r=4), "cannot merge this LILY"),
    ],
    ids=["prompt", "prefix", "lora_bias", "alora", "lily"],
)
def test_an_adapter_that_is_no_change_of_weights_is_refused(bases, tmp_path, config, message):
    save(bases["llama"], tmp_path / "adapter", config)
    with pytest.raises(InputError, match=message) as error:
        opened(bases["llama"], tmp_path / "adapter", tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("cache/*"))


def change_config(adapter, **fields):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def drop_tensor(adapter):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(n for n in tensors if "layers.1" in n))
    save_file(tensors, path)


def add_tensor(adapter):
    path = adapter / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.model.layers.7.x.weight": torch.zeros(1)}, path)


DAMAGES = {
    "another base's shapes": (
        lambda a: change_config(a, r=3),
        r"shape \[4, \d+\], but \[3, \d+\] on this base",
    ),
    "another base's modules": (
        lambda a: change_config(a, target_modules=["query_key_value"]),
        "Target modules .* not found in the base model",
    ),
    "rank 0": (lambda a: change_config(a, r=0), "positive integer value but the value passed is 0"),
    "unknown kind": (lambda a: change_config(a, peft_type="NEW"), "PEFT knows required, got 'NEW'"),
    "no kind": (lambda a: change_config(a, peft_type=None), "PEFT knows required, got None"),
    "half written config": (lambda a: (a / "adapter_config.json").write_text("{"), "Expecting"),
    "no config": (lambda a: (a / "adapter_config.json").unlink(), "No such file"),
    "half written weights": (
        lambda a: (a / "adapter_model.safetensors").write_bytes(b"half"),
        "header too small",
    ),
    "missing tensor": (drop_tensor, r"layers\.1.* is missing \(1 of 12 tensors are\)"),
    "surplus tensor": (add_tensor, r"layers\.7\.x\.weight belongs to no module"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_adapter_is_refused_in_one_line(bases, tmp_path, damage):
    harm, message = DAMAGES[damage]
    save(bases["llama"], tmp_path / "adapter", lora())
    harm(tmp_path / "adapter")
    with pytest.raises(InputError, match=message) as error:
        opened(bases["llama"], tmp_path / "adapter", tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert "adapter" in str(error.value)


def test_a_base_in_bfloat16_is_rounded_once(make, tmp_path):
    base = make(experts=()).base
    save(base, tmp_path / "adapter", lora())
    loader = opened(base, tmp_path / "adapter", tmp_path / "cache")
    exact = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter"
    ).merge_and_unload()
    for name, weight in exact.state_dict().items():
        assert torch.equal(loader.get_tensor(name), weight.to(torch.bfloat16))


METHODS = {
    "mediator": {"parameters": {"density": 1.0, "route": "all"}},
    "mediator_dense": {},
    "task_arithmetic": {"parameters": {"weight": 1.0}},
}


@pytest.mark.parametrize("kind", ["LoRA", "rsLoRA", "DoRA", "IA3"])
@pytest.mark.parametrize("method", METHODS)
def test_methods_get_adapters_as_peft_applies_them(bases, merged, tmp_path, read, kind, method):
    """Also mergekit's own: DoRA and rsLoRA come out right, because PEFT merges them there, too."""
    base = bases["llama"]
    config = {
        "merge_method": method,
        "base_model": str(base),
        "dtype": "float32",
        **METHODS[method],
    }
    changes = []
    for seed in range(2):
        save(base, tmp_path / f"a{seed}", LLAMA[kind], seed)
        adapted = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), tmp_path / f"a{seed}"
        )
        changes.append(adapted.merge_and_unload().state_dict())
    models = [{"model": f"{base}+{tmp_path / f'a{seed}'}"} for seed in range(2)]
    out = merged({**config, "models": models}, "--lora-merge-cache", str(tmp_path / "cache"))
    share = 1.0 if method == "task_arithmetic" else 0.5
    before = read(base)
    for name, weight in read(out).items():
        tau = sum(change[name] - before[name] for change in changes)
        torch.testing.assert_close(weight, before[name] + share * tau, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "cache").exists() == (method == "task_arithmetic")


@pytest.mark.parametrize("method", ["mediator", "mediator_dense", "tsvm"])
def test_a_change_of_one_of_two_tied_weights_is_refused_by_every_method(
    bases, refused, tmp_path, method
):
    base = bases["tied"]
    for seed in range(2):
        save(base, tmp_path / f"a{seed}", lora("embed_tokens"), seed)
    models = [{"model": f"{base}+{tmp_path / f'a{seed}'}"} for seed in range(2)]
    line = refused({"merge_method": method, "base_model": str(base), "models": models})
    assert "which are one weight (tie_word_embeddings)" in line


def test_a_plan_refuses_an_adapter_that_is_no_change_of_weights(bases, tmp_path):
    from mergekit.config import MergeConfiguration

    from mergekit_mediator.merge.inputs import HeaderInputs
    from mergekit_mediator.merge.preparation import prepared

    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    for seed in range(2):
        save(bases["llama"], tmp_path / f"a{seed}", config, seed)
    models = [{"model": f"{bases['llama']}+{tmp_path / f'a{seed}'}"} for seed in range(2)]
    settings = {"merge_method": "mediator", "base_model": str(bases["llama"]), "models": models}
    merge = MergeConfiguration.model_validate(settings)
    with (
        pytest.raises(InputError, match="changes weights required, got PROMPT_TUNING"),
        prepared(HeaderInputs, merge, MergeOptions()),
    ):
        pass
