"""Training reads packed prompts: the same loss as with one prompt a row, for each family of models."""

import pico
import pytest
import torch
from train_experts import answer_logits


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
