"""A patchwork of two models is each of them where all layers are its own, for each family of models."""

import layer_metrics
import pico
import pytest
import torch
from layer_gains import Patchwork


@pytest.fixture(params=[pico.llama_tied, pico.gemma3])
def models(request):
    torch.manual_seed(0)
    average = request.param().eval()
    return average, pico.perturbed(average, seed=1)


@torch.no_grad()
def test_a_patchwork_of_one_model_is_that_model(models):
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    positions = torch.arange(5)[None]
    patchwork = Patchwork(*models)
    for routed, model in zip((frozenset(), frozenset(patchwork.layers)), models, strict=True):
        patchwork.routed = routed
        states = patchwork.model(ids, positions, None, False).last_hidden_state
        expected = model.model(ids, position_ids=positions, use_cache=False).last_hidden_state
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_every_layer_has_every_metric_of_activations(models):
    average, expert = models
    found = layer_metrics.of_activations(None, average, {"one": expert}, {"one": [[1, 5, 6, 7]]})
    assert set(found) == {"linear error", "output error", "last state"}
    for profile in found.values():
        assert list(profile) == ["embed", "0", "1", "2", "final"]
    assert all(error > 0 for error in found["output error"].values())
