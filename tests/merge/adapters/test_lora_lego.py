"""Adapters that become one adapter."""

import json
from pathlib import Path

import adapters
import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mergekit_mediator.delta.factors import Factors
from mergekit_mediator.methods.lora_lego import k_means, merge_factors


@pytest.fixture(scope="module")
def trained(make, tmp_path_factory):
    """A base model, two adapters of it, and the change that each makes."""
    family = make(experts=(), dtype=torch.float32)
    root = tmp_path_factory.mktemp("adapters")
    changes = {
        name: adapters.train(family.base, root / name, seed, lora_alpha=6)
        for seed, name in enumerate(("math", "code"))
    }
    return family.base, root, changes


def config(base, *names, **parameters):
    return {
        "merge_method": "lora_lego",
        "base_model": str(base),
        "models": [{"model": f"{base}+{name}"} for name in names],
        "parameters": parameters,
    }


def change(base, adapter):
    """What an adapter changes as PEFT loads it, by weight."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    return {n: merged[n] - w for n, w in before.items() if not torch.equal(merged[n], w)}


def test_all_units_of_all_adapters_give_their_sum_rescaled(trained, merged):
    base, root, changes = trained
    out = merged(config(base, root / "math", root / "code", rank=4))
    found = change(base, out)
    assert found.keys() == changes["math"].keys()
    for name, tau in found.items():
        # each unit is a cluster of its own; √(2 / 4) keeps the size of an output
        expected = (changes["math"][name] + changes["code"][name]) * 2**-0.5
        torch.testing.assert_close(tau, expected, atol=1e-4, rtol=1e-3)


def test_the_same_adapter_twice_gives_that_adapter(trained, merged, tmp_path):
    base, root, changes = trained
    twin = tmp_path / "twin"
    twin.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (twin / file).write_bytes((root / "math" / file).read_bytes())
    found = change(base, merged(config(base, root / "math", twin)))
    for name, tau in changes["math"].items():
        torch.testing.assert_close(found[name], tau, atol=1e-4, rtol=1e-3)


def test_the_rank_is_that_of_the_adapters_and_lambda_scales(trained, merged):
    base, root, _ = trained
    models = (root / "math", root / "code")
    plain = merged(config(base, *models), name="plain")
    assert json.loads((plain / "adapter_config.json").read_text())["r"] == 2
    half = change(base, merged(config(base, *models, **{"lambda": 0.5}), name="half"))
    for name, tau in change(base, plain).items():
        torch.testing.assert_close(half[name], tau / 2, atol=1e-5, rtol=1e-4)


def test_adapters_keep_their_dtype(trained, merged, tmp_path):
    base, root, _ = trained
    for name in ("math", "code"):
        folder = tmp_path / name
        folder.mkdir()
        tensors = load_file(root / name / "adapter_model.safetensors")
        narrow = {key: tensor.bfloat16() for key, tensor in tensors.items()}
        save_file(narrow, folder / "adapter_model.safetensors", {"format": "pt"})
        text = (root / name / "adapter_config.json").read_text()
        (folder / "adapter_config.json").write_text(text)
    out = merged(config(base, tmp_path / "math", tmp_path / "code"))
    written = load_file(out / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}


def test_adapters_of_different_ranks_are_refused(trained, refused, tmp_path):
    base, root, _ = trained
    adapters.train(base, tmp_path / "large", 3, r=3)
    message = refused(config(base, root / "math", tmp_path / "large"))
    assert "adapters of one rank required, got 2 in" in message
    assert "and 3 in" in message


def test_a_rank_beyond_all_adapters_is_refused(trained, refused):
    base, root, _ = trained
    message = refused(config(base, root / "math", root / "code", rank=5))
    assert "rank: at most 4 required, that of all adapters together, got 5" in message


def test_a_model_without_an_adapter_is_refused(trained, refused):
    base, root, _ = trained
    document = config(base, root / "math", root / "code")
    document["models"][1]["model"] = str(base)
    assert "an adapter of the base model required" in refused(document)


def test_an_adapter_that_is_no_plain_one_is_refused(trained, refused, tmp_path):
    base, root, _ = trained
    adapters.train(base, tmp_path / "dora", 3, use_dora=True)
    message = refused(config(base, root / "math", tmp_path / "dora"))
    assert "a plain LoRA adapter required" in message


def test_an_unknown_parameter_is_refused(trained, refused):
    base, root, _ = trained
    message = refused(config(base, root / "math", root / "code", ranks=2))
    assert "unknown parameter 'ranks': use one of lambda, rank" in message


def test_the_example_merges_as_it_stands(trained, merged):
    base, root, _ = trained
    path = Path(__file__).parents[3] / "configs/lora_lego.yml"
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert "mergekit-yaml configs/lora_lego.yml out" in path.read_text(encoding="utf-8")
    document["base_model"] = str(base)
    for entry, name in zip(document["models"], ("math", "code"), strict=True):
        entry["model"] = f"{base}+{root / name}"
    assert change(base, merged(document))


def test_clusters_are_what_is_near_and_none_is_empty():
    points = torch.tensor([[10.0, 0.0], [10.1, 0.0], [0.0, 5.0], [0.1, 5.0], [0.0, 0.0]])
    clusters = k_means(points, 3).tolist()
    assert clusters[0] == clusters[1] != clusters[2] == clusters[3] != clusters[4]
    assert len(set(clusters)) == 3
    assert sorted(k_means(torch.ones(4, 2), 3).unique().tolist()) == [0, 1, 2]


def test_the_order_of_the_adapters_does_not_matter():
    generator = torch.Generator().manual_seed(0)

    def adapter():
        left, right = (torch.randn(n, 3, generator=generator) for n in (5, 4))
        return Factors(left, right, torch.tensor([1.0, -2.0, 0.5]))

    parts = [adapter() for _ in range(3)]
    there, back = merge_factors(parts, 3, 1.0), merge_factors(parts[::-1], 3, 1.0)
    torch.testing.assert_close(there.product(), back.product())
    assert there.product().isfinite().all()
