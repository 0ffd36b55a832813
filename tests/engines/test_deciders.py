import asyncio
import shutil

import pytest
import served_pico
import torch

from mergekit_mediator import MediatorModel
from mergekit_mediator.engines import deciders
from mergekit_mediator.engines.deciders import EmbeddingDecider, choose_decider
from mergekit_mediator.errors import ArtifactError, EngineError, RoutingError
from mergekit_mediator.store.manifest import ROUTER, read_manifest, write_manifest

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
    with pytest.raises(RoutingError, match="token ids from 0 to 63 are required, got"):
        asyncio.run(decider.decide([ids], "prompt"))
    assert asyncio.run(decider.decide(["w1"], "prompt")).weights.shape == (1, 3)


def test_auto_takes_the_router_that_needs_no_second_model(artifact):
    chosen = choose_decider(artifact, read_manifest(artifact), "auto")
    assert isinstance(chosen, EmbeddingDecider)
    assert "% of held-out prompts right" in chosen.name


def test_the_router_is_read_from_where_the_manifest_says_it_is(artifact, tmp_path):
    moved = shutil.copytree(artifact, tmp_path / "moved")
    manifest = read_manifest(moved)
    name = "mediator/router-0123456789ab.safetensors"  # as while another process calibrates
    (moved / ROUTER).rename(moved / name)
    files = {name if n == ROUTER else n: d for n, d in manifest.files.items()}
    write_manifest(moved, manifest.model_copy(update={"files": files}))
    chosen = choose_decider(moved, read_manifest(moved), "auto")
    assert isinstance(chosen, EmbeddingDecider)


def test_a_router_that_the_artifact_does_not_have_is_refused_at_the_start(artifact):
    with pytest.raises(RoutingError, match="calibrated with embedding features"):
        choose_decider(artifact, read_manifest(artifact), "hidden")


def test_an_artifact_that_the_process_cannot_load_is_named(artifact, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(artifact, damaged)
    (damaged / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="damaged"):
        choose_decider(damaged, read_manifest(damaged), "response")


def test_short_prompts_are_not_padded_to_the_longest_one(artifact, monkeypatch):
    model = MediatorModel.from_pretrained(artifact)
    monkeypatch.setattr(deciders, "_loaded", model)
    monkeypatch.setattr(deciders, "_router", "embedding")
    pad, shapes = model.pad, []

    def recorded(rows):
        ids, mask = pad(rows)
        shapes.append(tuple(ids.shape))
        return ids, mask

    object.__setattr__(model, "pad", recorded)
    weights, *_ = deciders._decide_there(["w1", "w1 " * 50], "prompt")
    assert len(weights) == 2
    assert [rows for rows, _ in shapes] == [1, 1]


def test_a_text_without_a_tokenizer_is_refused():
    with pytest.raises(RoutingError, match="a text needs one: send token ids"):
        deciders.token_ids(None, "w1", 64)


def test_a_router_whose_process_has_ended_is_said(artifact):
    chosen = choose_decider(artifact, read_manifest(artifact), "response")
    (process,) = chosen._pool._processes.values()
    process.kill()
    process.join()
    with pytest.raises(EngineError, match="the router's process has ended: start the server again"):
        asyncio.run(chosen.decide(["w1"], "prompt"))
    chosen.close()
