import pico
import pytest
import torch
from adapters import train
from peft import PeftModel
from transformers import AutoModelForCausalLM

from mergekit_mediator import MediatorModel
from mergekit_mediator.errors import ExportError
from mergekit_mediator.export.adapter import blend, write_peft
from mergekit_mediator.export.experts import StoredExperts
from mergekit_mediator.export.peft_lora import Holdable, to_adapter

IDS = torch.arange(4, 24)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def exported(out, mixture, rank, tmp_path, reference="dense"):
    """The adapter of a mixture, as PEFT loads it on the dense expert."""
    experts = StoredExperts(out, reference)
    adapter = to_adapter(experts, mixture, rank, Holdable.of(out))
    write_peft(adapter, tmp_path / "adapter", str(out), torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    return adapter, PeftModel.from_pretrained(dense, tmp_path / "adapter")


@pytest.fixture
def adapters(make, tmp_path):
    """An artifact of two adapters of different modules and ranks, in float32."""
    family = make(dtype=torch.float32)
    train(family.base, tmp_path / "a", 0, r=2, target_modules=["q_proj", "down_proj"])
    train(family.base, tmp_path / "b", 1, r=3, target_modules=["v_proj", "down_proj"])
    return {
        "merge_method": "mediator",
        "base_model": str(family.base),
        "models": [
            {"model": f"{family.base}+{tmp_path / n}", "parameters": {"expert": n}} for n in "ab"
        ],
    }


@pytest.mark.parametrize("reference", ["mean", "base"])
@pytest.mark.parametrize("mixture", [{"a": 1.0}, {"b": 1.0}, {"a": 0.25, "b": 0.75}], ids=str)
def test_adapters_come_out_exactly_as_they_are_served(
    adapters, merged, tmp_path, reference, mixture
):
    out = merged({**adapters, "parameters": {"reference": reference}})
    adapter, model = exported(out, mixture, 8, tmp_path)
    assert adapter.dropped == ()
    assert adapter.squared_error == 0
    served = MediatorModel.from_pretrained(out)
    with served.mixture(mixture) as mixed:
        torch.testing.assert_close(logits(model), logits(mixed), rtol=1e-4, atol=1e-5)


def test_relative_to_the_base_an_expert_keeps_its_own_rank(adapters, merged, tmp_path):
    out = merged({**adapters, "parameters": {"reference": "mean"}})
    relative = {
        reference: to_adapter(StoredExperts(out, reference), {"a": 1.0}, 8, Holdable.of(out))
        for reference in ("dense", "base")
    }
    assert {name: adapter.rank for name, adapter in relative.items()} == {"dense": 5, "base": 2}


@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "qwen3", "gemma3", "gpt2"])
def test_a_full_rank_export_is_what_is_served_but_for_what_no_adapter_holds(
    make, merged, tmp_path, architecture
):
    family = make(pico.ARCHITECTURES[architecture], dtype=torch.float32)
    out = merged(family.config(route="all", density=1.0))
    adapter, model = exported(out, {"math": 1.0}, 64, tmp_path)
    assert adapter.squared_error < 1e-6
    assert adapter.dropped
    assert all("norm" in n or "ln_" in n or n.endswith(".bias") for n in adapter.dropped)
    served = MediatorModel.from_pretrained(out)
    with served.mixture({"math": 1.0}) as mixed, torch.no_grad():
        mixed_weights = dict(mixed.named_parameters())
        adapted_weights = dict(model.named_parameters())
        for name in adapter.dropped:
            module, _, parameter = name.rpartition(".")
            names = (f"base_model.model.{module}{x}.{parameter}" for x in ("", ".base_layer"))
            target = next(n for n in names if n in adapted_weights)
            adapted_weights[target].copy_(mixed_weights[name])
        torch.testing.assert_close(logits(model), logits(mixed), rtol=1e-3, atol=1e-4)


def test_a_smaller_rank_loses_what_the_singular_values_say(make, merged, tmp_path):
    family = make(dtype=torch.float32)
    out = merged(family.config(route="all", density=1.0))
    experts = StoredExperts(out)
    holdable = Holdable.of(out)
    errors = []
    for rank in (1, 2, 4, 8, 16):
        adapter = to_adapter(experts, {"code": 1.0}, rank, holdable)
        factors = adapter.modules["model.layers.1.mlp.down_proj"].low_rank
        change = experts.change("model.layers.1.mlp.down_proj.weight", {"code": 1.0})
        matrix = change.tensor(experts.dense.weight("model.layers.1.mlp.down_proj.weight"))
        values = torch.linalg.svdvals(matrix.double())
        assert factors.squared_error == pytest.approx(float(values[rank:].square().sum()), abs=1e-6)
        error = matrix.double() - factors.left.double() @ factors.right.double().T
        assert float(error.square().sum()) == pytest.approx(
            factors.squared_error, rel=1e-3, abs=1e-6
        )
        errors.append(adapter.squared_error)
    assert errors == sorted(errors, reverse=True)


def test_a_blend_of_adapters_is_the_adapter_of_the_blend(adapters, merged):
    out = merged({**adapters, "parameters": {"reference": "base"}})
    experts, holdable = StoredExperts(out), Holdable.of(out)
    alone = {n: to_adapter(experts, {n: 1.0}, 8, holdable) for n in "ab"}
    both = blend([(0.25, alone["a"]), (0.75, alone["b"])], 8)
    expected = to_adapter(experts, {"a": 0.25, "b": 0.75}, 8, holdable)
    assert both.modules.keys() == expected.modules.keys()
    for module, factors in both.modules.items():
        other = expected.modules[module].low_rank
        torch.testing.assert_close(
            factors.low_rank.left @ factors.low_rank.right.T, other.left @ other.right.T
        )
    cut = blend([(0.25, alone["a"]), (0.75, alone["b"])], 3)
    assert cut.rank == 3
    assert 0 < cut.squared_error < 0.5


def test_bad_requests_are_refused_in_one_line(family, merged):
    out = merged(family.config(route="all", density=0.5))
    experts, holdable = StoredExperts(out), Holdable.of(out)
    with pytest.raises(
        ExportError, match="unknown expert 'law'; this artifact has math, code, chat"
    ):
        to_adapter(experts, {"law": 1.0}, 8, holdable)
    with pytest.raises(ExportError, match="rank: at least 1 is required, got 0"):
        to_adapter(experts, {"math": 1.0}, 0, holdable)
    with pytest.raises(
        ExportError, match="stored relative to the dense expert: export relative to"
    ):
        StoredExperts(out, "base")
    with pytest.raises(ExportError, match="relative to 'mean': dense or base is required"):
        StoredExperts(out, "mean")


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_a_module_keeps_the_least_rank_that_holds_a_part_of_its_change(
    make, merged, tmp_path, energy
):
    out = merged(make(dtype=torch.float32).config(route="all", density=1.0))
    experts, holdable = StoredExperts(out), Holdable.of(out)
    adapter = to_adapter(experts, {"code": 1.0}, 64, holdable, energy)
    for module, factors in adapter.modules.items():
        change = experts.change(f"{module}.weight", {"code": 1.0})
        matrix = change.tensor(experts.dense.weight(f"{module}.weight")).double()
        squares = torch.linalg.svdvals(matrix).square()
        rank = factors.low_rank.rank
        assert float(squares[:rank].sum()) >= energy * float(squares.sum()) * (1 - 1e-6)
        assert float(squares[: rank - 1].sum()) < energy * float(squares.sum()) * (1 + 1e-6)


def test_factors_keep_the_least_rank_that_holds_a_part_of_their_change(adapters, merged):
    out = merged({**adapters, "parameters": {"reference": "base"}})
    experts, holdable = StoredExperts(out), Holdable.of(out)
    whole = to_adapter(experts, {"b": 1.0}, 8, holdable)
    part = to_adapter(experts, {"b": 1.0}, 8, holdable, 0.6)
    assert part.rank < whole.rank
    assert 0 < part.squared_error <= 0.4
    with pytest.raises(ExportError, match="energy: above 0 and at most 1 is required, got 0"):
        to_adapter(experts, {"b": 1.0}, 8, holdable, 0.0)


def test_tied_modules_are_written_with_one_component_too(make, merged, tmp_path):
    out = merged(make(pico.llama_tied).config(route="all", density=0.5))
    adapter, model = exported(out, {"math": 1.0}, 1, tmp_path)
    assert {"model.embed_tokens", "lm_head"} <= adapter.modules.keys()
    assert logits(model).isfinite().all()
