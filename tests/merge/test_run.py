import functools
import threading
import weakref
from collections import Counter
from pathlib import Path

import pico
import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.options import MergeOptions
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mergekit_mediator import MediatorModel
from mergekit_mediator.merge.loaders import OpenInputs
from mergekit_mediator.merge.run import run
from mergekit_mediator.store.expert_file import open_expert
from mergekit_mediator.store.manifest import read_manifest

ONE_LAYER = {"routed_layers": "1"}


def densities(out, name="math"):
    """The fraction of coordinates that an expert keeps, by weight."""
    (entry,) = [e for e in read_manifest(out).experts if e.name == name]
    file = open_expert(out, entry)
    return {w: d.count / torch.Size(d.shape).numel() for w, d in file.weights.items()}


def mean(base, experts, weights):
    total = sum(w * (e.double() - base.double()) for e, w in zip(experts, weights, strict=True))
    return base.double() + total / sum(weights)


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=1e-6)


def test_weights_of_experts_are_their_shares_of_the_mean(family, merged, read):
    config = family.config(route="none")
    for entry, weight in zip(config["models"], (1.0, 2.0, 0.0), strict=True):
        entry["parameters"]["weight"] = weight
    dense, base = read(merged(config)), read(family.base)
    experts = [read(path) for path in family.experts.values()]
    for name, weight in dense.items():
        close(weight, mean(base[name], [e[name] for e in experts], (1.0, 2.0, 0.0)))


def test_lambda_scales_the_change_of_averaged_layers_only(family, merged, read):
    settings = {**ONE_LAYER, "lambda": 0.5}
    dense, base = read(merged(family.config(**settings))), read(family.base)
    experts = [read(path) for path in family.experts.values()]
    for name, weight in dense.items():
        full = mean(base[name], [e[name] for e in experts], (1, 1, 1))
        routed = ".layers.1." in name
        close(weight, full if routed else (full + base[name].double()) / 2)


@pytest.mark.parametrize("settings", [{"lambda": 0.5}, {"reference": "base"}], ids=str)
def test_weights_that_wait_for_the_choice_of_layers_are_those_of_a_known_choice(
    family, merged, read, settings
):
    waited = merged(family.config(**settings), name="waited")
    routed = ",".join(layer.name for layer in read_manifest(waited).routed_layers)
    expected = read(merged(family.config(routed_layers=routed, **settings), name="known"))
    dense = read(waited)
    assert dense.keys() == expected.keys()
    assert all(torch.equal(dense[name], expected[name]) for name in dense)
    assert not [path for path in waited.iterdir() if path.name.startswith("tmp")]


def test_routed_layers_may_hold_the_base(family, merged, read):
    dense = read(merged(family.config(**ONE_LAYER, reference="base")))
    base = read(family.base)
    same = {name for name in base if torch.equal(dense[name], base[name])}
    assert same == {name for name in base if ".layers.1." in name}


def test_experts_keep_only_the_routed_layers(family, merged):
    out = merged(family.config(**ONE_LAYER))
    (layer,) = read_manifest(out).routed_layers
    assert layer.name == "1"
    for name in family.experts:
        assert set(densities(out, name)) == set(layer.weights)


def test_density_is_the_fraction_kept_of_each_weight(family, merged):
    for weight, fraction in densities(merged(family.config(route="all", density=0.25))).items():
        assert fraction == pytest.approx(0.25, abs=0.02), weight


def test_density_may_differ_by_expert(family, merged):
    config = family.config(route="all", density=0.5)
    config["models"][0]["parameters"]["density"] = 0.125
    out = merged(config)
    name = "model.layers.0.mlp.up_proj.weight"
    assert [densities(out, e)[name] for e in family.experts] == [0.125, 0.5, 0.5]


def test_density_may_be_a_filter(family, merged):
    density = [{"filter": "mlp", "value": 0.5}, {"value": 0.25}]
    fractions = densities(merged(family.config(route="all", density=density)))
    assert fractions["model.layers.0.mlp.up_proj.weight"] == 0.5
    assert fractions["model.layers.0.self_attn.q_proj.weight"] == 0.25


def test_density_may_be_a_gradient_over_the_layers(family, merged):
    fractions = densities(merged(family.config(route="all", density=[0.25, 0.75])))
    rising = [fractions[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(3)]
    assert rising == [0.25, 0.5, 0.75]


def test_quantised_experts_come_close(family, merged, read):
    model = MediatorModel.from_pretrained(
        merged(family.config(route="all", density=1.0, values="int8"))
    )
    expert = read(family.experts["math"])
    with model.mixture({"math": 1.0}) as mixed:
        for name, weight in mixed.state_dict().items():
            torch.testing.assert_close(
                weight.float(), expert[name].float(), rtol=0.02, atol=0.005, msg=name
            )


def reads_by_model(family, merged, monkeypatch, name, **settings):
    """How often each tensor of each model is read, by the model's directory."""
    reads = {}
    stock = LazyTensorLoader.get_tensor

    def counting(self, key, *args, **kwargs):
        reads.setdefault(Path(self.index.base_path).name, Counter())[key] += 1
        return stock(self, key, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LazyTensorLoader, "get_tensor", counting)
        merged(family.config(**settings), name=name)
    return {model: reads[model] for model in ("base", *family.experts)}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"route": "all"},
        {"route": "all", "bits": 4.0},
        {"lambda": 0.5, "reference": "base"},
        {"lambda": 0.5, "tokenizer": {"source": "base"}},
    ],
    ids=str,
)
def test_no_weight_of_any_model_is_read_more_than_twice(family, merged, monkeypatch, settings):
    for reads in reads_by_model(family, merged, monkeypatch, "out", **settings).values():
        assert set(reads.values()) <= {1, 2}


def test_only_what_is_stored_is_read_a_second_time(family, merged, monkeypatch):
    reads = reads_by_model(family, merged, monkeypatch, "out", **ONE_LAYER)
    assert set(reads.pop("base").values()) == {1}
    for counts in reads.values():
        assert {key for key, times in counts.items() if times == 2} == {
            key for key in counts if ".layers.1." in key
        }


def most_inputs_at_once(family, out, monkeypatch, **settings):
    """The largest number of the inputs' tensors that are in memory when another one is loaded."""
    alive, most, lock = set(), 0, threading.Lock()
    stock = OpenInputs.load

    def watching(self, *args):
        nonlocal most
        tensor = stock(self, *args)
        with lock:
            alive.add(weakref.ref(tensor, alive.discard))
            most = max(most, len(alive))
        return tensor

    config = family.config(route="all", density=0.5, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(OpenInputs, "load", watching)
        run(MergeConfiguration.model_validate(config), str(out), MergeOptions(quiet=True))
    return most


def test_the_inputs_in_memory_do_not_depend_on_the_number_of_layers(make, tmp_path, monkeypatch):
    few, many = make(), make(lambda: pico.llama(num_hidden_layers=9))
    most = most_inputs_at_once(few, tmp_path / "few", monkeypatch)
    assert most == 2  # the base and one expert, on one worker
    assert most_inputs_at_once(many, tmp_path / "many", monkeypatch) == most


@pytest.mark.parametrize("settings", [{}, {"values": "int4"}, {"conflict": "sign"}], ids=str)
def test_the_inputs_in_memory_do_not_depend_on_the_number_of_experts(
    make, tmp_path, monkeypatch, settings
):
    wide = functools.partial(pico.llama, num_hidden_layers=1, vocab_size=4096)
    names = [f"e{i}" for i in range(32)]
    few, many = make(wide, experts=tuple(names[:4])), make(wide, experts=tuple(names))
    most = most_inputs_at_once(few, tmp_path / "few", monkeypatch, **settings)
    assert most_inputs_at_once(many, tmp_path / "many", monkeypatch, **settings) == most == 2


def test_adapters_are_merged_into_their_base(family, merged, tmp_path):
    import peft

    models = []
    for seed, name in enumerate(("sums", "family")):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(family.base, dtype="auto")
        settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(base, settings).save_pretrained(tmp_path / name)
        models.append({"model": f"{family.base}+{tmp_path / name}"})
    out = merged(family.config(models=models, route="all", density=1.0))
    model = MediatorModel.from_pretrained(out)
    assert model.experts == ("sums", "family")
    assert model.manifest.experts[0].source == models[0]["model"]
    base = AutoModelForCausalLM.from_pretrained(family.base, dtype="auto")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "sums").merge_and_unload()
    with model.mixture({"sums": 1.0}) as mixed:
        for name, weight in mixed.state_dict().items():
            torch.testing.assert_close(weight, adapted.state_dict()[name])
    changed = model.manifest.layers[1].conflict["dispersion"]
    assert changed > 0


def slices_of(family, *ranges, **parameters):
    models = [family.base, *family.experts.values()]
    return [
        {
            "sources": [{"model": str(m), "layer_range": list(span)} for m in models],
            **({"parameters": parameters} if parameters else {}),
        }
        for span in ranges
    ]


def with_slices(family, slices, **settings):
    config = family.config(**settings)
    del config["models"]
    return {**config, "slices": slices}


@pytest.mark.parametrize(
    ("ranges", "sources"),
    [([(0, 3)], [0, 1, 2]), ([(0, 1), (2, 3)], [0, 2]), ([(0, 2), (1, 3)], [0, 1, 1, 2])],
    ids=["all", "dropped", "repeated"],
)
def test_slices_may_keep_drop_and_repeat_layers(family, merged, read, ranges, sources):
    slices = slices_of(family, *ranges)
    out = merged(with_slices(family, slices, route="all", density=1.0))
    names = [str(i) for i in range(len(sources))]
    assert [x.name for x in read_manifest(out).layers] == ["embed", *names, "final"]
    model = MediatorModel.from_pretrained(out)
    assert model.model.config.num_hidden_layers == len(sources)
    expert = read(list(family.experts.values())[1])
    name = "model.layers.{}.mlp.up_proj.weight"
    with model.mixture({model.experts[1]: 1.0}) as mixed:
        for index, source in enumerate(sources):
            weight = mixed.state_dict()[name.format(index)]
            assert torch.equal(weight, expert[name.format(source)])


def test_slices_have_parameters_of_their_own(family, merged):
    slices = [
        *slices_of(family, (0, 1), density=0.5),
        *slices_of(family, (1, 3), density=0.125),
    ]
    config = with_slices(family, slices, route="all")
    out = merged(config)
    fractions = densities(out, read_manifest(out).expert_names[0])
    rows = [fractions[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(3)]
    assert rows == [0.5, 0.125, 0.125]


def test_modules_work_like_models(family, merged, read):
    config = family.config(route="all", density=0.5)
    plain = merged(config)
    modules = {"default": {"models": config.pop("models")}}
    other = merged({**config, "modules": modules}, name="modules")
    first, second = read(plain), read(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert densities(plain) == densities(other)


@pytest.fixture
def wider(make):
    """A family of which one expert knows two more words."""
    family = make()
    torch.manual_seed(7)
    path = family.experts["code"]
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    model.resize_token_embeddings(pico.VOCABULARY + 2)
    model.save_pretrained(path)
    pico.tokenizer(extra=("x0", "x1")).save_pretrained(path)
    return family


@pytest.mark.parametrize(("source", "rows"), [("union", 66), ("base", 64)])
def test_vocabularies_are_aligned_as_the_tokenizer_setting_says(wider, merged, read, source, rows):
    out = merged(wider.config(tokenizer={"source": source}, route="all", density=1.0))
    assert len(AutoTokenizer.from_pretrained(out)) == rows
    model = MediatorModel.from_pretrained(out)
    ids, source_ids = (
        AutoTokenizer.from_pretrained(p).get_vocab() for p in (out, wider.experts["code"])
    )
    expert = read(wider.experts["code"])
    with model.mixture({"code": 1.0}) as mixed:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weight = mixed.state_dict()[name]
            assert weight.shape[0] == rows
            assert all(torch.equal(weight[ids[t]], expert[name][source_ids[t]]) for t in ids)


def test_the_tokenizer_and_its_chat_template_are_copied(family, merged):
    tokenizer = AutoTokenizer.from_pretrained(merged(family.config()))
    assert tokenizer.chat_template == pico.CHAT_TEMPLATE


def test_a_small_shard_size_gives_many_files_that_load(family, merged):
    out = merged(family.config(route="all", density=0.5), "--out-shard-size", "2K")
    shards = sorted(path.name for path in out.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert set(shards) | {"model.safetensors.index.json"} <= set(read_manifest(out).files)
    model = MediatorModel.from_pretrained(out)
    with model.mixture({"math": 1.0}):
        pass


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"dtype": "float32"}, torch.float32),
        ({"dtype": "float32", "out_dtype": "float16"}, torch.float16),
        ({"out_dtype": "float32"}, torch.float32),
    ],
)
def test_the_output_dtype_is_the_configured_one(family, merged, read, settings, dtype):
    out = merged(family.config(**settings))
    assert {w.dtype for w in read(out).values()} == {dtype}
    assert AutoConfig.from_pretrained(out).dtype == dtype


def test_without_a_configured_dtype_the_widest_of_the_inputs_is_written_and_named(
    family, make, merged, read
):
    wide = make(dtype=torch.float32).experts["code"]
    config = family.config(route="all")
    config["models"][1]["model"] = str(wide)
    out = merged(config)
    assert {w.dtype for w in read(out).values()} == {torch.float32}
    assert AutoConfig.from_pretrained(out).dtype == torch.float32


def test_the_mean_is_taken_in_float32_and_rounded_once(family, merged, read):
    dense = read(merged(family.config(route="none", dtype="bfloat16", out_dtype="float32")))
    base, experts = read(family.base), [read(path) for path in family.experts.values()]
    for name, weight in dense.items():
        expected = mean(base[name], [e[name] for e in experts], (1, 1, 1))
        torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=1e-6)


def test_the_same_merge_gives_the_same_bytes(family, merged):
    first, second = merged(family.config()), merged(family.config(), name="out2")
    names = {n for n in read_manifest(first).files if n != "README.md"}
    assert {n for n in read_manifest(second).files if n != "README.md"} == names
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_a_model_card_is_written_unless_it_is_switched_off(family, merged):
    card = (merged(family.config()) / "README.md").read_text()
    assert "mediator" in card
    assert "The dense expert takes " in card
    assert str(family.base.parent) not in card.split("## Configuration")[0]
    other = merged(family.config(), "--no-write-model-card", name="plain")
    assert not (other / "README.md").exists()
