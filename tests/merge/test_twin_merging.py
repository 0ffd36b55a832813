"""Twin-Merging: a shared model and low-rank differences, served as any artifact."""

from pathlib import Path

import pytest
import torch
import yaml
from commands import call, figures, write

from mergekit_mediator import MediatorModel


def twin(family, **parameters):
    config = family.config("twin_merging", **parameters)
    for entry, name in zip(config["models"], family.experts, strict=True):
        entry["parameters"] = {"expert": name}
    return config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_expert_is_the_mean_plus_its_leading_directions(dtype, make, merged, read):
    family = make(dtype=dtype)
    out = merged(twin(family, rank=3))
    experts = {name: read(path) for name, path in family.experts.items()}
    model = MediatorModel.from_pretrained(out)
    dense = {name: weight.clone().float() for name, weight in model.model.state_dict().items()}
    tolerance = (
        {"atol": 1e-5, "rtol": 0} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 1e-2}
    )
    for name, weight in dense.items():
        mean = torch.stack([e[name].float() for e in experts.values()]).mean(dim=0)
        torch.testing.assert_close(weight, mean, **tolerance)
    for expert, weights in experts.items():
        with model.mixture({expert: 1.0}) as mixed:
            for name, found in mixed.state_dict().items():
                expected = weights[name].float()
                if expected.ndim == 2:
                    left, values, right = torch.linalg.svd(expected - dense[name])
                    expected = dense[name] + left[:, :3] * values[:3] @ right[:3]
                torch.testing.assert_close(found.float(), expected, **tolerance)


def test_a_rank_above_the_smaller_side_is_refused(family, refused):
    message = refused(twin(family, rank=9))
    assert "rank: at most 8 required, the smaller side of" in message
    assert "got 9" in message


@pytest.mark.parametrize("name", ["budget", "lambda", "density", "ranks"])
def test_a_parameter_of_another_method_is_refused(name, family, refused):
    message = refused(twin(family, **{name: 1}))
    assert f"parameters: unknown parameter {name!r}: use one of rank, weight" in message


def test_plan_and_merge_of_this_package_take_the_method(family, tmp_path):
    config = write(twin(family, rank=2), tmp_path / "config.yml")
    planned = figures("plan", config)
    assert {layer["routed"] for layer in planned["layers"]} == {True}
    output = call("merge", config, str(tmp_path / "out"), "--quiet").output
    assert "dense expert and 3 sparse experts, 5 of 5 layers routed" in output
    assert set(MediatorModel.from_pretrained(tmp_path / "out").experts) == set(family.experts)


def test_mediator_takes_a_rank_alone(family, merged, refused):
    model = MediatorModel.from_pretrained(merged(family.config(route="all", rank=2), name="ranked"))
    assert set(model.experts) == set(family.experts)
    assert "budget and rank contradict each other" in refused(family.config(rank=2, budget="2x"))


def test_a_plan_counts_the_numbers_of_a_rank(family, tmp_path, read):
    planned = figures("plan", write(family.config(route="all", rank=2), tmp_path / "config.yml"))
    numbers = [
        2 * sum(weight.shape) if weight.ndim == 2 else weight.numel()
        for weight in read(family.base).values()
    ]
    experts, bytes_each = len(family.experts), 2  # bfloat16
    assert sum(layer["experts"] for layer in planned["layers"]) == experts * bytes_each * sum(
        numbers
    )


def test_the_example_merges_and_routes(family, merged):
    text = (Path(__file__).parents[2] / "configs/twin_merging.yml").read_text(encoding="utf-8")
    assert "mergekit-yaml configs/twin_merging.yml out" in text
    config = yaml.safe_load(text)
    config["base_model"] = str(family.base)
    for entry, path in zip(config["models"], family.experts.values(), strict=True):
        entry["model"] = str(path)
    config["parameters"]["rank"] = 4  # the smaller sides of a pico model end at 8
    model = MediatorModel.from_pretrained(merged(config))
    prompt = model.tokenizer("w1 w2 w3", return_tensors="pt")
    assert float(model.route(prompt).weights.sum()) == pytest.approx(1.0)
    assert model.generate(**prompt, max_new_tokens=2).shape[0] == 1
