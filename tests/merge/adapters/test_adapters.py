"""Adapters of any targets, ranks and layers come back as PEFT itself applies them."""

import contextlib
import re
import tempfile
from pathlib import Path

import peft
import pico
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM

from mergekit_mediator import MediatorModel
from mergekit_mediator.merge.run import run

TARGETS = [
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj", "lm_head"),
]
FORMS = ("merge", "rows")
IDS = torch.randint(4, 60, (2, 7), generator=torch.Generator().manual_seed(0))


@st.composite
def adapters(draw):
    """The settings of one adapter: few targets of few layers, with ranks and scales of their own."""
    targets = draw(st.lists(st.sampled_from(TARGETS), min_size=1, max_size=4, unique=True))
    rank, alpha = st.integers(1, 30), st.integers(1, 40)
    target = st.sampled_from(targets)
    drawn = {
        "target_modules": targets,
        "r": draw(rank),
        "lora_alpha": draw(alpha),
        "use_rslora": draw(st.booleans()),
        "rank_pattern": draw(st.dictionaries(target, rank, max_size=2)),
        "alpha_pattern": draw(st.dictionaries(target, alpha, max_size=2)),
    }
    layers = draw(st.none() | st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True))
    if layers is not None and targets != ["lm_head"]:
        drawn["layers_to_transform"] = layers
    return drawn


def on(*targets, **more):
    return {"target_modules": list(targets), **more}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train(base, out, seed, config):
    """Write an adapter with random factors; gives what PEFT answers with it, and the changes of weights."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **config)).eval()
    adapted.save_pretrained(out)
    answer = logits(adapted)
    after = adapted.merge_and_unload().state_dict()
    return answer, {name: after[name] - before[name] for name in before}


def merge(base, adapters, out, **parameters):
    """Merge adapters of a base by name, and load what comes out."""
    models = [
        {"model": f"{base}+{path}", "parameters": {"expert": n}} for n, path in adapters.items()
    ]
    return load({"base_model": str(base), "models": models, "parameters": parameters}, out)


def load(config, out):
    config = MergeConfiguration.model_validate({"merge_method": "mediator", **config})
    run(config, str(out), MergeOptions(quiet=True))
    return MediatorModel.from_pretrained(out)


@pytest.fixture(scope="module")
def base(make):
    return make(dtype=torch.float32, experts=()).base


@contextlib.contextmanager
def directory():
    with tempfile.TemporaryDirectory() as root:
        yield Path(root)


def answers_as_peft(base, configs, blend, **parameters):
    """Merge adapters, and compare every expert and a blend in both forms with PEFT."""
    with directory() as root:
        names = [f"e{i}" for i in range(len(configs))]
        trained = {n: train(base, root / n, i, configs[i]) for i, n in enumerate(names)}
        model = merge(base, {name: root / name for name in names}, root / "out", **parameters)
        expected = [({n: 1.0}, answer) for n, (answer, _) in trained.items()]
        blended = AutoModelForCausalLM.from_pretrained(base)
        blend = blend[: len(names)]
        # a mixture of total p goes p of the way from the dense expert, here the mean, to the experts
        mean = (1 - sum(blend)) / len(names)
        with torch.no_grad():
            for (_, changes), p in zip(trained.values(), blend, strict=True):
                for name, weight in blended.state_dict().items():
                    weight.add_(changes[name], alpha=p + mean)
        expected.append((dict(zip(names, blend, strict=True)), logits(blended)))
        for mixture, answer in expected:
            for form in FORMS:
                result = model.forward(IDS, mixture=mixture, apply=form).logits
                assert float((result - answer).abs().max()) < 1e-3 * float(answer.abs().max())


BLENDS = st.lists(st.sampled_from([0.2, 0.5, 1.0, 1.3]), min_size=4, max_size=4)
ANY = [on("q_proj", "up_proj"), on("k_proj", r=30, layers_to_transform=[1, 2]), on("lm_head")]


@settings(max_examples=12, phases=[Phase.explicit, Phase.generate])
@given(st.lists(adapters(), min_size=2, max_size=4), BLENDS)
@example([on("q_proj"), on("up_proj")], [0.5] * 4)
@example([on("q_proj", "v_proj"), on("q_proj", "k_proj", "v_proj", "o_proj")], [0.3] * 4)
@example([on("q_proj", layers_to_transform=[0]), on("q_proj")], [1.3] * 4)
@example(ANY, [0.2] * 4)
def test_any_adapters_answer_as_peft_does(base, configs, blend):
    answers_as_peft(base, configs, blend)


@pytest.mark.parametrize(
    "parameters", [{"reference": "base"}, {"density": 1.0, "route": "all"}], ids=str
)
def test_any_adapters_answer_as_peft_does_however_they_are_stored(base, parameters):
    configs = (
        [*ANY, on("embed_tokens", "o_proj")] if "density" in parameters else [*ANY, on("o_proj")]
    )
    answers_as_peft(base, configs, [0.4, 0.3, 0.2, 0.1], **parameters)


@pytest.mark.parametrize("rank", [9, 16, 40])
def test_a_rank_above_that_of_the_weight_is_stored_and_answers_as_peft_does(base, rank):
    """The weight of k_proj is [8, 16]."""
    answers_as_peft(base, [on("k_proj", r=rank), on("k_proj", "down_proj", r=rank)], [0.5] * 2)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """Two adapters of different targets: their directories, and the changes that they make."""
    root = tmp_path_factory.mktemp("adapters")
    configs = {"a": on("q_proj", "up_proj"), "b": on("k_proj", "up_proj", r=3)}
    changes = {n: train(base, root / n, i, c)[1] for i, (n, c) in enumerate(configs.items())}
    return {name: root / name for name in configs}, changes


def check(model, base, experts):
    """Compare the weights of every expert with the base and a change by name."""
    weights = AutoModelForCausalLM.from_pretrained(base).state_dict()
    for expert, change in experts.items():
        with model.mixture(expert) as mixed:
            for name, weight in mixed.state_dict().items():
                torch.testing.assert_close(weight, weights[name] + change(name))


def test_layers_that_are_not_routed_keep_the_mean(base, trained, tmp_path):
    paths, changes = trained
    model = merge(base, paths, tmp_path / "out", routed_layers="1", weight=0.7)

    def expected(expert):
        mean = {name: (changes["a"][name] + changes["b"][name]) / 2 for name in changes["a"]}
        return lambda name: (changes[expert] if ".layers.1." in name else mean)[name]

    check(model, base, {expert: expected(expert) for expert in paths})


def test_experts_may_have_other_weights_in_other_layers(base, trained, tmp_path):
    paths, changes = trained
    weights = {"a": [{"filter": "up_proj", "value": 0}, {"value": 0.2}], "b": [0.1, 0.9]}
    models = [
        {"model": f"{base}+{paths[n]}", "parameters": {"expert": n, "weight": weights[n]}}
        for n in paths
    ]
    model = load({"base_model": str(base), "models": models}, tmp_path / "out")
    check(model, base, {expert: change.__getitem__ for expert, change in changes.items()})


def test_layers_in_another_order_get_the_factors_of_where_they_come_from(base, trained, tmp_path):
    paths, changes = trained
    models = [str(base), *(f"{base}+{path}" for path in paths.values())]
    order = {"0": "2", "1": "0", "2": "1"}
    slices = [
        {"sources": [{"model": m, "layer_range": [int(i), int(i) + 1]} for m in models]}
        for i in order.values()
    ]
    model = load({"base_model": str(base), "slices": slices}, tmp_path / "out")
    weights = AutoModelForCausalLM.from_pretrained(base).state_dict()
    for expert, change in changes.items():
        with model.mixture(expert) as mixed:
            for name, weight in mixed.state_dict().items():
                source = re.sub(r"(?<=layers\.)\d", lambda match: order[match[0]], name)
                torch.testing.assert_close(weight, weights[source] + change[source])


def test_adapters_of_a_base_that_has_one_itself_are_compared_with_it(base, trained, tmp_path):
    """Their factors are changes of the plain base."""
    paths, changes = trained
    train(base, tmp_path / "c", 7, on("o_proj", "up_proj"))
    models = [{"model": f"{base}+{path}"} for path in paths.values()]
    config = {"base_model": f"{base}+{tmp_path / 'c'}", "models": models}
    model = load({**config, "parameters": {"route": "all", "density": 1.0}}, tmp_path / "out")
    check(model, base, {expert: change.__getitem__ for expert, change in changes.items()})
    model = load({**config, "parameters": {"route": "auto"}}, tmp_path / "auto")
    assert not any(
        d.factors for f in model._mixer.experts.files.values() for d in f.weights.values()
    )


def test_a_rate_stores_no_rounding_of_an_adapter_to_the_dtype_of_its_base(make, tmp_path):
    """Of a small change of weights in bfloat16, half and more is rounding, which has no low rank."""
    base = make(
        lambda: pico.llama(hidden_size=128, intermediate_size=256, vocab_size=512), experts=()
    ).base
    train(base, tmp_path / "a", 0, on("q_proj", "up_proj", "down_proj", r=4, lora_alpha=0.01))
    model = {"model": f"{base}+{tmp_path / 'a'}", "parameters": {"expert": "a"}}
    config = {
        "merge_method": "mediator",
        "base_model": str(base),
        "models": [model],
        "parameters": {"keep": 0.99, "values": "low_rank"},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    sizes = []
    for dtype in (None, "bfloat16"):
        out = tmp_path / str(dtype)
        options = MergeOptions(quiet=True, lora_merge_dtype=dtype)
        run(MergeConfiguration.model_validate(config), str(out), options)
        sizes.append((out / "mediator/experts/a.safetensors").stat().st_size)
    assert sizes[0] < sizes[1] / 2
