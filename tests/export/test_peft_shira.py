import json

import pytest
import torch
from adapter_kinds import logits
from families import linear_only
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from mergekit_mediator import MediatorModel
from mergekit_mediator.errors import ExportError
from mergekit_mediator.export.experts import StoredExperts
from mergekit_mediator.export.folder import export_shira
from mergekit_mediator.export.peft_lora import Holdable
from mergekit_mediator.export.peft_shira import to_sparse


@pytest.fixture(scope="module")
def families(make):
    return {t: linear_only(make(dtype=t)) for t in (torch.float32, torch.bfloat16)}


def adapted(out, adapter, dtype):
    base = AutoModelForCausalLM.from_pretrained(out, dtype=dtype)
    return PeftModel.from_pretrained(base, adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stock_peft_makes_the_weights_that_are_served(families, merged, read, tmp_path, dtype):
    out = merged(families[dtype].config(route="all", density=0.2, reference="base"))
    exported = export_shira(StoredExperts(out), tmp_path / "adapters")
    assert [expert.dropped for expert in exported] == [(), (), ()]
    served = MediatorModel.from_pretrained(out)
    for expert in exported:
        model = adapted(out, tmp_path / "adapters" / expert.name, dtype)
        with served.mixture(expert.name) as mixed:
            expected = mixed.state_dict()
            torch.testing.assert_close(logits(model), logits(mixed), rtol=1e-5, atol=1e-5)
            weights = model.merge_and_unload().state_dict()
            for name, weight in expected.items():
                torch.testing.assert_close(weights[name], weight, rtol=1e-6, atol=1e-7)
            assert not torch.equal(weights["lm_head.weight"], read(out)["lm_head.weight"])


def test_every_module_holds_as_many_values_as_peft_takes(families, merged, tmp_path):
    out = merged(families[torch.float32].config(route="all", density=0.2, reference="base"))
    (expert,) = export_shira(StoredExperts(out), tmp_path / "adapters", ["math"])
    config = json.loads((tmp_path / "adapters/math/adapter_config.json").read_text())
    assert config["r"] == expert.rank
    shapes = {"q_proj": (16, 16), "k_proj": (8, 16), "down_proj": (16, 24), "lm_head": (64, 16)}
    with safe_open(tmp_path / "adapters/math/adapter_model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            module = name.rsplit(".", 2)[-2]
            count = expert.rank * sum(shapes.get(module, (0, 0)))
            if not count:
                continue
            tensor = file.get_tensor(name)
            indices = name.endswith("shira_indices")
            assert tensor.shape == ((2, count) if indices else (count,))
            assert tensor.dtype == (torch.int32 if indices else torch.float32)


def test_what_is_no_linear_layer_is_named_and_left_out_only_if_asked(make, merged, tmp_path):
    out = merged(make(dtype=torch.float32).config(route="all", density=0.1, reference="base"))
    experts = StoredExperts(out)
    message = r"'math': it changes \d+ weights that are no matrices of linear layers.*embed_tokens"
    with pytest.raises(ExportError, match=message):
        export_shira(experts, tmp_path / "adapters", ["math"])
    assert not (tmp_path / "adapters").exists()
    (expert,) = export_shira(experts, tmp_path / "adapters", ["math"], drop=True)
    sparse = to_sparse(experts, "math", Holdable.of(out))
    assert expert.dropped == sparse.dropped
    assert len(sparse.dropped) > 1
    assert 0 < expert.dropped_part < 1
    model = adapted(out, tmp_path / "adapters/math", torch.float32)
    served = MediatorModel.from_pretrained(out)
    with served.mixture("math") as mixed, torch.no_grad():
        expected, weights = mixed.state_dict(), model.merge_and_unload()
        weights.load_state_dict({n: expected[n] for n in sparse.dropped}, strict=False)
        torch.testing.assert_close(logits(weights), logits(mixed), rtol=1e-5, atol=1e-5)


def test_tied_embeddings_are_no_linear_layer(make, merged):
    import pico

    out = merged(make(pico.llama_tied).config(route="all", density=0.1, reference="base"))
    sparse = to_sparse(StoredExperts(out), "math", Holdable.of(out))
    assert "model.embed_tokens.weight" in sparse.dropped
    assert "lm_head" not in sparse.modules


def test_more_changes_than_a_layer_has_room_for_are_refused(families, merged):
    out = merged(families[torch.float32].config(route="all", density=1.0, reference="base"))
    with pytest.raises(
        ExportError, match=r"values, for which SHiRA takes .* merge with a lower dens"
    ):
        to_sparse(StoredExperts(out), "math", Holdable.of(out))
    with pytest.raises(ExportError, match="relative to dense required"):
        to_sparse(StoredExperts(out, "base"), "math", Holdable.of(out))


def test_an_unknown_expert_is_refused(families, merged):
    out = merged(families[torch.float32].config(route="all", density=0.1))
    with pytest.raises(ExportError, match="unknown expert 'law'"):
        to_sparse(StoredExperts(out), "law", Holdable.of(out))
