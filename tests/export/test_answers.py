import pytest
import torch
from families import linear_only
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_mediator import MediatorModel
from mergekit_mediator.errors import ExportError
from mergekit_mediator.export.answers import AnswerProbe
from mergekit_mediator.export.experts import StoredExperts
from mergekit_mediator.export.folder import export_adapters, export_shira
from mergekit_mediator.export.peft_lora import Holdable, to_adapter
from mergekit_mediator.models.prompts import render

PROMPTS = [f"w{i} w{i + 7} w{2 * i}" for i in range(6)]


@pytest.fixture(scope="module")
def family(make):
    return make(dtype=torch.float32)


def test_the_divergence_is_that_of_peft_from_the_served_expert(family, merged, tmp_path):
    out = merged(family.config(route="all", density=0.5))
    (expert,) = export_adapters(
        StoredExperts(out), tmp_path / "a", 2, ["math"], drop=True, prompts=PROMPTS
    )
    served = MediatorModel.from_pretrained(out)
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "a/math").eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    terms, same = [], []
    with served.mixture("math") as mixed, torch.no_grad():
        for prompt in PROMPTS:
            ids = torch.tensor([render(tokenizer, prompt)])
            start = ids.shape[1]
            whole = mixed.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)
            first, second = (
                model(whole).logits[0, start - 1 : -1].double().log_softmax(-1)
                for model in (mixed, adapted)
            )
            terms.append((first.exp() * (first - second)).sum(-1))
            same.append(first.argmax(-1) == second.argmax(-1))
    assert float(torch.cat(terms).mean()) > 1e-3
    assert expert.answers.divergence == pytest.approx(float(torch.cat(terms).mean()), rel=1e-3)
    assert expert.answers.same == pytest.approx(float(torch.cat(same).double().mean()), abs=0.02)
    card = (tmp_path / "a/math/README.md").read_text()
    assert f"nats a token | {expert.answers.divergence:.3g} |" in card


def test_a_form_that_holds_everything_answers_as_the_expert(make, merged, tmp_path):
    linear = linear_only(make(dtype=torch.float32))
    out = merged(linear.config(route="all", density=0.2, reference="base"))
    for expert in export_shira(StoredExperts(out), tmp_path / "a", prompts=PROMPTS):
        assert expert.answers.divergence < 1e-6
        assert expert.answers.same == 1


def test_the_model_is_as_before_between_experts(family, merged):
    out = merged(family.config(route="all", density=0.5))
    experts = StoredExperts(out)
    probe, holdable = AnswerProbe(experts, PROMPTS), Holdable.of(out)
    adapters = {n: to_adapter(experts, {n: 1.0}, 2, holdable) for n in ("math", "code")}
    first = probe.error("math", adapters["math"])
    assert probe.error("code", adapters["code"]) != first
    assert probe.error("math", adapters["math"]) == first


def test_adapters_of_the_base_have_no_model_to_answer(family, merged):
    out = merged(family.config(route="all", bits=3))
    with pytest.raises(ExportError, match="relative to dense required"):
        AnswerProbe(StoredExperts(out, "base"), PROMPTS)
