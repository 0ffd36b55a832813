"""Routers decide on the device as on the processor."""

import json
import shutil

import pytest
import served_pico
import torch

from mergekit_mediator import MediatorModel
from mergekit_mediator.models.loading import load_plain, load_tokenizer
from mergekit_mediator.route.calibrate import calibrate_artifact

pytestmark = pytest.mark.gpu
EXPERTS = tuple(served_pico.WORDS)


@pytest.fixture(scope="module")
def asked():
    """Prompts of each expert's own words, and the experts."""
    prompts = {name: served_pico.prompts(name, 4, seed=1) for name in EXPERTS}
    return [p for rows in prompts.values() for p in rows], [n for n in EXPERTS for _ in range(4)]


def files(folder):
    paths = {}
    for name in EXPERTS:
        paths[name] = folder / f"{name}.jsonl"
        lines = [json.dumps({"prompt": prompt}) for prompt in served_pico.prompts(name, 20)]
        paths[name].write_text("\n".join(lines))
    return paths


def placed(root, device):
    model = MediatorModel.from_pretrained(root)
    model.model.to(device)
    return model


def chosen(decision):
    return [decision.experts[place] for place in decision.weights.argmax(dim=1).tolist()]


def assert_same(found, expected, tolerance):
    assert found.experts == expected.experts
    for name in ("weights", "entropy"):
        a, b = (getattr(decision, name).cpu() for decision in (found, expected))
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("router", ["response", "likelihood", "embedding"])
def test_a_router_decides_as_on_the_processor(artifact, device, asked, router):
    decisions = [placed(artifact, d).route(asked[0], router=router) for d in (device, "cpu")]
    assert_same(*decisions, tolerance=1e-2)
    assert chosen(decisions[0]) == chosen(decisions[1])


@pytest.mark.parametrize("kind", ["embedding", "hidden"])
def test_a_router_that_is_calibrated_on_the_device_finds_the_experts(
    artifact, device, tmp_path, asked, kind
):
    decisions = []
    for name, where in (("there", device), ("here", torch.device("cpu"))):
        root = tmp_path / name
        shutil.copytree(artifact, root)
        model = load_plain(root).to(where)
        calibrate_artifact(root, model, load_tokenizer(root), files(tmp_path), kind=kind)
        decisions.append(placed(root, where).route(asked[0], router="calibrated"))
    assert_same(*decisions, tolerance=0.05)
    if kind == "embedding":
        assert chosen(decisions[0]) == asked[1]


@pytest.mark.parametrize("router", ["response", "embedding"])
@pytest.mark.parametrize("policy", ["hard", "soft", "auto"])
def test_requests_are_routed_and_answered(artifact, device, asked, router, policy):
    model = placed(artifact, device)
    model.policy = policy
    decision = model.route(asked[0], router=router)
    mixtures = model.mixtures(decision, router)
    assert mixtures.shape == (len(asked[0]), len(EXPERTS))
    ids, mask = (part.to(device) for part in model.tokenize(asked[0][:5]))
    told = model.generate(ids, mask, max_new_tokens=3, do_sample=False)
    assert told.device.type == device.type
    logits = model.forward(ids, mask).logits
    assert bool(logits.isfinite().all())


def test_a_prompt_that_opens_on_the_last_user_turn_is_routed(artifact, device):
    model = placed(artifact, device)
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    turns.append({"role": "user", "content": "w20 w21 w22"})
    ids = model.tokenizer.apply_chat_template(
        turns, return_tensors="pt", add_generation_prompt=True, return_dict=True
    )["input_ids"]
    found, expected = (
        placed(artifact, where).route(ids, route_on="last_user") for where in (device, "cpu")
    )
    assert_same(found, expected, 1e-2)
