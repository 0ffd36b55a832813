import pico
import pytest
import torch
from transformers import AutoModelForCausalLM

from mergekit_mediator import MediatorModel
from mergekit_mediator.store.manifest import read_manifest


@pytest.fixture(scope="module", params=list(pico.ARCHITECTURES))
def case(request, make, tmp_path_factory):
    """One architecture: its family, and the artifact in which every layer of it is routed."""
    import click.testing
    import yaml
    from mergekit.scripts.run_yaml import main

    family = make(pico.ARCHITECTURES[request.param])
    root = tmp_path_factory.mktemp(request.param)
    config = family.config(route="all", density=1.0)
    (root / "config.yml").write_text(yaml.safe_dump(config))
    arguments = [str(root / "config.yml"), str(root / "out"), "--quiet"]
    click.testing.CliRunner().invoke(main, arguments, catch_exceptions=False)
    return family, root / "out"


def test_the_dense_expert_loads_and_is_the_mean_of_the_experts(case):
    family, out = case
    dense, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    experts = [
        AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict()
        for path in family.experts.values()
    ]
    for name, weight in dense.state_dict().items():
        mean = torch.stack([e[name].double() for e in experts]).mean(0)
        # rounded once to the eight significant bits of bfloat16
        assert weight.dtype == torch.bfloat16
        assert bool(((weight.double() - mean).abs() <= mean.abs() * 2**-8 + 1e-7).all()), name


def test_layers_are_the_embedding_the_blocks_and_the_rest(case):
    manifest = read_manifest(case[1])
    assert [layer.name for layer in manifest.layers] == ["embed", "0", "1", "2", "final"]
    for layer in manifest.layers[1:-1]:
        assert all(f".{layer.name}." in weight for weight in layer.weights)


def test_every_weight_of_the_checkpoint_belongs_to_one_layer(case, read):
    out = case[1]
    weights = [weight for layer in read_manifest(out).layers for weight in layer.weights]
    assert sorted(weights) == sorted(read(out))


def test_parameters_are_counted_once_where_weights_are_tied(case):
    model = AutoModelForCausalLM.from_pretrained(case[1])
    assert read_manifest(case[1]).parameter_count == sum(p.numel() for p in model.parameters())


def test_every_expert_comes_back_bit_for_bit(case):
    family, out = case
    model = MediatorModel.from_pretrained(out)
    for name, path in family.experts.items():
        expert = AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict()
        with model.mixture({name: 1.0}) as mixed:
            state = mixed.state_dict()
            assert state.keys() == expert.keys()
            assert all(torch.equal(state[key], expert[key]) for key in expert)


def test_every_prompt_is_routed_and_answered(case):
    model = MediatorModel.from_pretrained(case[1])
    batch = model.tokenizer(["w1 w2", "w3 w4 w5"], return_tensors="pt", padding=True)
    decision = model.route(batch)
    assert decision.weights.shape == (2, 3)
    assert torch.allclose(decision.weights.sum(1), torch.ones(2))
    answer = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert answer.shape[0] == 2
