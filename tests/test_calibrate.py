"""Calibrating an artifact: the router is put in place with its digests, or nothing changes."""

import json

import pytest
import torch

from mergekit_mediator import artifact
from mergekit_mediator.artifact import read_manifest, verify_files
from mergekit_mediator.calibrate import calibrate_artifact
from mergekit_mediator.errors import RoutingError
from mergekit_mediator.hidden import hidden_features
from mergekit_mediator.runtime import MediatorModel

WORDS = {"math": range(0, 3), "code": range(20, 23), "chat": range(40, 43)}


@pytest.fixture
def out(family, merged):
    return merged(family.config(route="all", density=0.5))


@pytest.fixture
def data(tmp_path):
    """Ten prompts per expert, of words that the others do not use."""
    files = {}
    for name, words in WORDS.items():
        generator = torch.Generator().manual_seed(len(name))
        picks = torch.randint(words.start, words.stop, (10, 6), generator=generator).tolist()
        lines = [json.dumps({"prompt": " ".join(f"w{i}" for i in row)}) for row in picks]
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("\n".join(lines))
    return files


def calibrate(out, data, **options):
    model = MediatorModel.from_pretrained(out)
    return calibrate_artifact(out, model.model, model.tokenizer, data, **options)


@pytest.mark.parametrize("kind", ["embedding", "hidden"])
def test_a_calibrated_artifact_routes_prompts_like_those_given(out, data, kind):
    result = calibrate(out, data, kind=kind)
    assert result.figures["accuracy"] >= 0.9
    model = MediatorModel.from_pretrained(out)
    assert model.manifest.router["data"].keys() == data.keys()
    for name, words in WORDS.items():
        decision = model.route([f"w{words[2]} w{words[0]} w{words[1]} w{words[2]}"])
        assert decision.experts == model.experts
        assert model.experts[int(decision.weights.argmax())] == name


def test_the_same_data_and_seed_give_the_same_router(out, data):
    calibrate(out, data, seed=3)
    first = (out / artifact.ROUTER).read_bytes()
    calibrate(out, data, seed=3)
    assert (out / artifact.ROUTER).read_bytes() == first


def test_the_data_of_one_expert_can_be_replaced_alone(out, data):
    calibrate(out, data)
    digests = read_manifest(out).router["data"]
    lines = data["code"].read_text().split("\n")
    data["code"].write_text("\n".join(lines[:7]))
    result = calibrate(out, {"code": data["code"]})
    assert result.figures["prompts"] == {"math": 10, "code": 7, "chat": 10}
    after = read_manifest(out).router["data"]
    assert after["math"] == digests["math"]
    assert after["code"] != digests["code"]
    verify_files(out, read_manifest(out))


def test_bad_data_leaves_the_old_router_as_it_was(out, data):
    calibrate(out, data)
    before = (out / artifact.ROUTER).read_bytes(), (out / artifact.MANIFEST).read_bytes()
    data["math"].write_text('{"prompt": "w1"}\nnothing')
    with pytest.raises(RoutingError, match=r"math\.jsonl line 2 is no JSON"):
        calibrate(out, data)
    assert before == ((out / artifact.ROUTER).read_bytes(), (out / artifact.MANIFEST).read_bytes())


def test_experts_that_are_not_there_are_refused(out, data):
    with pytest.raises(
        RoutingError, match="--data law: this artifact has no such expert, but math"
    ):
        calibrate(out, {"law": data["math"]})
    with pytest.raises(RoutingError, match="no data for chat: give --data"):
        calibrate(out, {"math": data["math"], "code": data["code"]})


def test_hidden_features_are_those_of_a_whole_pass(out):
    model = MediatorModel.from_pretrained(out, dtype=torch.float32)
    ids = torch.tensor([[11, 12, 13], [14, 15, 16]])
    summary = torch.tensor([7, 8])
    with torch.no_grad():
        states = model.model.base_model(
            input_ids=torch.cat([ids, summary.expand(2, 2)], dim=1), output_hidden_states=True
        ).hidden_states
    expected = torch.cat([states[1][:, 1:3].mean(dim=1), states[2][:, 2:].mean(dim=1)], dim=1)
    counted = torch.tensor([[False, True, True]] * 2)
    mask = torch.ones_like(ids)
    got = hidden_features(model.model, ids, mask, counted, summary, 3, (1, 2))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_features_do_not_depend_on_padding(out, side):
    model = MediatorModel.from_pretrained(out, dtype=torch.float32).model
    summary = torch.tensor([7, 8])
    row, pad = [11, 12, 13], [0, 0]
    ids = torch.tensor([pad + row if side == "left" else row + pad])
    mask = (ids > 0).long()
    alone = torch.tensor([row])
    everything = torch.ones_like(alone)
    want = hidden_features(model, alone, everything, everything.bool(), summary, 6, (1, 2))
    got = hidden_features(model, ids, mask, mask.bool(), summary, 6, (1, 2))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
