import asyncio

import pytest
import served_pico
import torch

from mergekit_mediator import MediatorModel
from mergekit_mediator.engines.deciders import EmbeddingDecider, choose_decider
from mergekit_mediator.errors import EngineError, RoutingError
from mergekit_mediator.store.manifest import read_manifest

TEXTS = [text for name in served_pico.WORDS for text in served_pico.prompts(name, 3, seed=1)]


@pytest.fixture(scope="module", params=["embedding", "response"])
def decider(request, artifact):
    chosen = choose_decider(artifact, read_manifest(artifact), request.param)
    yield chosen
    chosen.close()


def test_a_service_decides_as_the_routed_model_does(decider, artifact):
    router = "embedding" if isinstance(decider, EmbeddingDecider) else "response"
    model = MediatorModel.from_pretrained(artifact)
    expected = model.route(TEXTS, router=router)
    decision = asyncio.run(decider.decide(TEXTS, "prompt"))
    assert decision.experts == expected.experts
    torch.testing.assert_close(decision.weights, expected.weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decision.ood, expected.ood, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_token_ids_are_routed_as_they_are(decider):
    decision = asyncio.run(decider.decide([(4, 5, 6)], "prompt"))
    assert decision.weights.shape == (1, 3)


@pytest.mark.parametrize("ids", [(4, 64), (-1, 4)])
def test_token_ids_that_the_model_does_not_have_are_refused_and_the_next_prompt_works(decider, ids):
    with pytest.raises(RoutingError, match="token ids from 0 to 63 required, got"):
        asyncio.run(decider.decide([ids], "prompt"))
    assert asyncio.run(decider.decide(["w1"], "prompt")).weights.shape == (1, 3)


def test_auto_takes_the_router_that_needs_no_second_model(artifact):
    chosen = choose_decider(artifact, read_manifest(artifact), "auto")
    assert isinstance(chosen, EmbeddingDecider)
    assert "% of held-out prompts right" in chosen.name


def test_a_router_whose_process_has_ended_is_said(artifact):
    chosen = choose_decider(artifact, read_manifest(artifact), "response")
    (process,) = chosen._pool._processes.values()
    process.kill()
    process.join()
    with pytest.raises(EngineError, match="the router's process has ended: start the server again"):
        asyncio.run(chosen.decide(["w1"], "prompt"))
    chosen.close()
