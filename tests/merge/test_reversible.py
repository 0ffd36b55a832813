"""Reversible merging: one basis for all experts and coefficients for each, served as any artifact."""

from pathlib import Path

import pytest
import torch
import yaml
from commands import figures, write
from safetensors.torch import save_file

from mergekit_mediator import MediatorModel
from mergekit_mediator.store.expert_file import ExpertFile


def reversible(family, **parameters):
    config = family.config("reversible", **parameters)
    for entry, name in zip(config["models"], family.experts, strict=True):
        entry["parameters"] = {"expert": name}
    return config


@pytest.fixture
def low_rank(make, read):
    """Experts in float32 whose matrices each change in one direction."""
    family = make(dtype=torch.float32)
    base = read(family.base)
    for seed, path in enumerate(family.experts.values()):
        generator = torch.Generator().manual_seed(seed)

        def changed(weight, generator=generator):
            if weight.ndim != 2:
                return weight + 0.01 * torch.randn(weight.shape, generator=generator)
            left, right = (torch.randn(size, generator=generator) for size in weight.shape)
            return weight + 0.02 * torch.outer(left, right)

        weights = {name: changed(weight) for name, weight in base.items()}
        save_file(weights, path / "model.safetensors", {"format": "pt"})
    return family


def test_every_expert_is_recovered_where_the_rank_holds_all_of_them(low_rank, merged, read):
    # three experts of rank 1, less their mean, are two combinations of rank 3
    model = MediatorModel.from_pretrained(merged(reversible(low_rank, rank=6)))
    for expert, path in low_rank.experts.items():
        with model.mixture({expert: 1.0}) as mixed:
            found = {name: weight.clone() for name, weight in mixed.state_dict().items()}
        for name, weight in read(path).items():
            torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=0, msg=name)


def test_all_experts_store_the_same_basis(family, merged):
    out = merged(reversible(family, rank=3))
    files = [ExpertFile(out / f"mediator/experts/{name}.safetensors") for name in family.experts]
    name = "model.layers.1.mlp.up_proj.weight"
    first, *others = (file.read(name).factors for file in files)
    assert first.rank == 3
    for other in others:
        assert torch.equal(first.left, other.left)
        assert torch.equal(first.right, other.right)
        assert not torch.equal(first.scales, other.scales)


def test_an_expert_of_low_rank_is_nearer_the_more_directions_there_are(family, merged, read):
    distances = []
    expert, path = next(iter(family.experts.items()))
    wanted = read(path)
    for rank in (1, 4, 8):
        model = MediatorModel.from_pretrained(merged(reversible(family, rank=rank), name=str(rank)))
        with model.mixture({expert: 1.0}) as mixed:
            state = mixed.state_dict()
            distances.append(
                sum(float((state[n].float() - w.float()).square().sum()) for n, w in wanted.items())
            )
    assert distances[0] > 1.1 * distances[1] > 1.2 * distances[2]


def test_experts_that_equal_each_other_store_no_basis(family, merged):
    config = reversible(family, rank=2)
    names = list(family.experts)
    config["models"] = [
        {"model": str(path), "parameters": {"expert": name}}
        for name, path in zip(names[:2], [family.base, family.base], strict=True)
    ]
    config["models"][0]["model"] = str(family.experts[names[0]])
    config["models"][1]["model"] = f"{family.experts[names[0]]}/"
    out = merged(config)
    for name in names[:2]:
        stored = ExpertFile(out / f"mediator/experts/{name}.safetensors")
        assert not any(d.factors for d in stored.weights.values())


def test_a_plan_reads_headers_alone(family, tmp_path):
    planned = figures("plan", write(reversible(family, rank=2), tmp_path / "config.yml"))
    assert {layer["routed"] for layer in planned["layers"]} == {True}


def test_a_rank_above_the_smaller_side_is_refused(family, refused):
    assert "rank: at most 8 required, the smaller side of" in refused(reversible(family, rank=9))


def test_a_parameter_of_another_method_is_refused(family, refused):
    message = refused(reversible(family, basis="own"))
    assert "parameters: unknown parameter 'basis': use one of rank, weight" in message


def test_a_basis_of_mediator_needs_a_rank(family, refused):
    message = refused(family.config(route="all", basis="shared"))
    assert "basis: shared of a `rank`, got none: give the rank" in message


def test_the_example_merges_and_routes(family, merged):
    text = (Path(__file__).parents[2] / "configs/reversible.yml").read_text(encoding="utf-8")
    assert "mergekit-yaml configs/reversible.yml out" in text
    config = yaml.safe_load(text)
    config["base_model"] = str(family.base)
    for entry, path in zip(config["models"], family.experts.values(), strict=True):
        entry["model"] = str(path)
    config["parameters"]["rank"] = 4  # the smaller sides of a pico model end at 8
    model = MediatorModel.from_pretrained(merged(config))
    prompt = model.tokenizer("w1 w2 w3", return_tensors="pt")
    assert float(model.route(prompt).weights.sum()) == pytest.approx(1.0)
    assert model.generate(**prompt, max_new_tokens=2).shape[0] == 1
