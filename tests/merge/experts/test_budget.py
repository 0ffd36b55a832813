import pico
import pytest

from mergekit_mediator import MediatorModel
from mergekit_mediator.merge import expert_pass
from mergekit_mediator.merge.experts.budget import slopes_for
from mergekit_mediator.store.expert_file import open_expert
from mergekit_mediator.store.manifest import read_manifest


def stored(out):
    """Bytes of the dense expert and of everything together."""
    files = read_manifest(out).files
    dense = sum(d.bytes for name, d in files.items() if name.startswith("model"))
    experts = [d.bytes for name, d in files.items() if name.startswith("mediator/experts")]
    return dense, sum(experts)


def error(out, family, read):
    """The squared error of every expert that comes back, as a share of its difference from the mean."""
    model = MediatorModel.from_pretrained(out)
    dense = {n: w.float().clone() for n, w in model.model.state_dict().items()}
    lost = whole = 0.0
    for name, path in family.experts.items():
        expert = read(path)
        with model.mixture({name: 1.0}) as mixed:
            for key, weight in mixed.state_dict().items():
                lost += float((weight.float() - expert[key].float()).square().sum())
                whole += float((dense[key] - expert[key].float()).square().sum())
    return lost / whole


@pytest.fixture(scope="module")
def wide(make):
    """Wide enough that what comes with each weight is a small part of what is stored."""
    return make(lambda: pico.llama(hidden_size=128, intermediate_size=384, head_dim=64))


@pytest.mark.parametrize("bits", [1.0, 4.0])
def test_experts_take_about_the_bits_that_are_asked_for(wide, merged, bits):
    out = merged(wide.config(route="all", bits=bits))
    for entry in read_manifest(out).experts:
        file = open_expert(out, entry)
        numel = sum(d.numel for d in file.weights.values())
        spent = 8 * sum(sum(d.sizes) for d in file.weights.values()) / numel
        assert spent == pytest.approx(bits, rel=0.1)


def test_more_bits_lose_less(family, merged, read):
    errors = [
        error(merged(family.config(route="all", bits=bits), name=f"out{bits}"), family, read)
        for bits in (0.5, 2, 6)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_bits_hold_in_the_routed_layers_only(family, merged):
    out = merged(family.config(routed_layers="1", bits=2))
    (layer,) = read_manifest(out).routed_layers
    for entry in read_manifest(out).experts:
        assert set(open_expert(out, entry).weights) <= set(layer.weights)


@pytest.mark.parametrize("settings", [{"bits": 0.0001}, {"budget": "1.0x"}, {"budget": "1kB"}])
def test_too_little_is_refused_by_name(family, mergekit_yaml, tmp_path, settings):
    result = mergekit_yaml(family.config(**settings), tmp_path / "out")
    assert isinstance(result.exception, SystemExit), result.exception
    (name,) = settings
    assert f"Error: {name}" in result.output
    assert not (tmp_path / "out").exists()


def checkpoint_bytes(out):
    """Of the dense expert as an ordinary checkpoint, with its tokenizer."""
    ours = {"README.md", "mergekit_config.yml"}
    return sum(p.stat().st_size for p in out.iterdir() if p.is_file() and p.name not in ours)


def test_a_budget_bounds_the_whole_directory(wide, merged):
    for multiple in (1.5, 2.0):
        out = merged(wide.config(budget=f"{multiple}x"), name=f"out{multiple}")
        total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        ratio = total / checkpoint_bytes(out)
        assert multiple - 0.25 * (multiple - 1) < ratio <= multiple


def test_a_budget_holds_even_where_sizes_were_predicted_too_small(wide, merged, monkeypatch):
    passes = []

    def too_much(*arguments):
        passes.append(1)
        return slopes_for(*arguments, reserve=-0.2)

    monkeypatch.setattr(expert_pass, "slopes_for", too_much)
    out = merged(wide.config(budget="1.5x"))
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert 1.35 < total / checkpoint_bytes(out) <= 1.5
    assert len(passes) > 1
    assert set(MediatorModel.from_pretrained(out).experts) == set(wide.experts)


def test_a_budget_may_be_given_in_bytes(wide, merged):
    first = merged(wide.config(budget="1.5x"), name="multiple")
    size = round(1.5 * checkpoint_bytes(first))
    second = merged(wide.config(budget=f"{size} B"), name="bytes")
    assert stored(first) == stored(second)
