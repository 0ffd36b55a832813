"""Training reads packed prompts: the same loss as with one prompt a row, for each family of models."""

import pico
import pytest
import torch
from train_experts import answer_logits
from trained_parts import change_a_share, masks, with_adapter


@pytest.mark.parametrize("family", [pico.llama_tied, pico.gemma3])
def test_packed_prompts_have_the_logits_of_prompts_alone(family, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: torch.no_grad())
    torch.manual_seed(0)
    model = family().eval()
    pairs = [([1, 5, 6, 7], [8, 2]), ([1, 5, 9], [10, 11, 2]), ([1, 5, 6, 4], [12, 2])]
    logits, targets, rows = answer_logits(model, pairs)
    assert targets.tolist() == [8, 2, 10, 11, 2, 12, 2]
    for row, (prompt, answer) in enumerate(pairs):
        with torch.no_grad():
            alone = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(logits[rows == row], alone, atol=1e-5, rtol=1e-5)


def stepped(model, parameters):
    """What a step of training changes of a model, by name."""
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    model(torch.tensor([[1, 5, 6, 7]])).logits.square().mean().backward()
    optimizer.step()
    return {name: weight != before[name] for name, weight in model.named_parameters()}


def test_a_share_of_the_numbers_changes_and_no_other():
    model = pico.llama_tied()
    change_a_share(model, 0.15)
    allowed = masks(model, 0.15)
    changed = stepped(model, model.parameters())
    assert not any((moved & ~allowed[name]).any() for name, moved in changed.items())
    assert sum(int(moved.sum()) for moved in changed.values()) > 100


def test_an_adapter_changes_and_no_weight_of_the_model():
    model = pico.llama_tied()
    with_adapter(model, 4)
    changed = stepped(model, [p for p in model.parameters() if p.requires_grad])
    assert {name for name, moved in changed.items() if moved.any()} == {
        name for name in changed if "lora_B" in name
    }
