"""Calibration of an artifact: the router and its digests are stored, or nothing changes."""

import json

import pico
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from mergekit_mediator.cli.main import main
from mergekit_mediator.errors import PromptError, RoutingError
from mergekit_mediator.route.calibrate import calibrate_artifact
from mergekit_mediator.route.features import hidden_features
from mergekit_mediator.serve.model import MediatorModel
from mergekit_mediator.store import manifest as artifact
from mergekit_mediator.store.manifest import read_manifest
from mergekit_mediator.store.verification import verify_files

WORDS = {"math": range(0, 3), "code": range(20, 23), "chat": range(40, 43)}


@pytest.fixture
def out(family, merged):
    return merged(family.config(route="all", density=0.5))


@pytest.fixture
def data(tmp_path):
    """Files of ten prompts per expert, of words that the other experts do not use."""
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
def test_a_calibrated_artifact_routes_similar_prompts_to_their_expert(out, data, kind):
    result = calibrate(out, data, kind=kind)
    assert result.figures["accuracy"] >= 0.9
    model = MediatorModel.from_pretrained(out)
    assert model.manifest.router["data"].keys() == data.keys()
    for name, words in WORDS.items():
        decision = model.route([f"w{words[2]} w{words[0]} w{words[1]} w{words[2]}"])
        assert decision.experts == model.experts
        assert model.experts[int(decision.weights.argmax())] == name


def test_a_calibrated_router_goes_by_the_name_of_its_features(out, data):
    calibrate(out, data, kind="embedding")
    model = MediatorModel.from_pretrained(out)
    named = model.route(["w1 w2"], router="embedding")
    assert torch.equal(named.weights, model.route(["w1 w2"]).weights)
    with pytest.raises(RoutingError, match="calibrate --features hidden` to route by hidden"):
        model.route(["w1 w2"], router="hidden")


def test_the_same_data_and_seed_give_the_same_router(out, data):
    calibrate(out, data, seed=3)
    first = (out / artifact.ROUTER).read_bytes()
    calibrate(out, data, seed=3)
    assert (out / artifact.ROUTER).read_bytes() == first


def test_mixtures_keep_their_digest_when_a_router_is_calibrated(out, data):
    before = MediatorModel.from_pretrained(out).mixture_digest("math")
    calibrate(out, data)
    assert MediatorModel.from_pretrained(out).mixture_digest("math") == before


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


LINE = '{"prompt": "w1"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"math\.jsonl: at least 5 prompts required, got 0"),
        (4 * LINE, r"math\.jsonl: at least 5 prompts required, got 4"),
        (LINE + "nothing", r"math\.jsonl line 2: no JSON"),
        (LINE + '{"text": "w1"}', r"math\.jsonl line 2: either a text"),
        (LINE + '{"messages": [{"role": "user"}]}', r"math\.jsonl line 2: every message needs"),
        (None, r"math\.jsonl: cannot be read"),
        (b"\xff\xfe", r"math\.jsonl: cannot be read"),
    ],
)
def test_bad_data_leaves_the_old_router_as_it_was(out, data, text, message):
    calibrate(out, data, kind="embedding")
    before = {path: path.read_bytes() for path in (out / "mediator").iterdir() if path.is_file()}
    if text is None:
        data["math"].unlink()
    elif isinstance(text, bytes):
        data["math"].write_bytes(text)
    else:
        data["math"].write_text(text)
    with pytest.raises(PromptError, match=message):
        calibrate(out, data, kind="embedding")
    assert before == {p: p.read_bytes() for p in (out / "mediator").iterdir() if p.is_file()}


def test_features_that_are_not_finite_leave_the_old_router_as_it_was(out, data):
    calibrate(out, data)
    before = (out / artifact.ROUTER).read_bytes(), (out / artifact.MANIFEST).read_bytes()
    model = MediatorModel.from_pretrained(out)
    with torch.no_grad():
        model.model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(RoutingError, match="expert 'math': finite features required"):
        calibrate_artifact(out, model.model, model.tokenizer, data)
    assert before == ((out / artifact.ROUTER).read_bytes(), (out / artifact.MANIFEST).read_bytes())


def test_two_experts_with_the_same_data_are_warned_about_with_the_confusion(out, data):
    data["code"].write_text(data["math"].read_text())
    result = calibrate(out, data)
    assert any("held-out prompts of 'code' to 'math'" in line for line in result.warnings)
    assert result.figures["confusion"][1][0] > 0


def test_conversations_are_put_through_the_chat_template(out, data):
    for path in data.values():
        lines = [json.loads(line) for line in path.read_text().split("\n")]
        path.with_suffix(".chat").write_text(
            "\n".join(
                json.dumps({"messages": [{"role": "user", "content": line["prompt"]}]})
                for line in lines
            )
        )
    texts = calibrate(out, data).router
    chats = calibrate(out, {name: path.with_suffix(".chat") for name, path in data.items()}).router
    assert all(torch.equal(texts.features[name], chats.features[name]) for name in data)


def command(*arguments):
    return CliRunner().invoke(main, ["calibrate", *map(str, arguments)])


def options(option, data):
    return [text for name, path in data.items() for text in (option, f"{name}={path}")]


def test_the_command_calibrates_and_shows_the_confusion(out, data):
    result = command(out, *options("--data", data), "--features", "embedding")
    assert result.exit_code == 0, result.output
    assert "held-out prompts of each expert (rows) routed to each expert" in result.output
    assert " between held-out prompts and 40 general requests" in result.output
    assert "calibrated with 10 prompts of each expert" in (out / "README.md").read_text()
    shown = CliRunner().invoke(main, ["inspect", str(out)]).output
    assert "AUROC of the out-of-distribution score" in shown
    result = command(out, *options("--add", {"code": data["code"]}), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["prompts"] == {"math": 10, "code": 10, "chat": 10}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --data for all experts, or --add for some"),
        (["--data", "math"], "NAME=FILE.jsonl is required, got 'math'"),
        (["--data", "math=gone.jsonl"], "it names none for code, chat: add them, or use --add"),
        (["--add", "math=gone.jsonl"], "gone.jsonl: cannot be read"),
    ],
)
def test_the_command_names_the_missing_data(out, arguments, message):
    result = command(out, *arguments)
    assert result.exit_code != 0
    assert message in result.output
    assert not (out / artifact.ROUTER).exists()


def test_data_of_an_unknown_expert_and_missing_data_are_refused(out, data):
    with pytest.raises(
        RoutingError,
        match=r"--data law: the name of an expert .* required: one of math, code, chat",
    ):
        calibrate(out, {"law": data["math"]})
    with pytest.raises(RoutingError, match="no data for chat: give --data NAME=FILE"):
        calibrate(out, {"math": data["math"], "code": data["code"]})


def test_hidden_features_are_those_of_a_whole_pass(out):
    model = MediatorModel.from_pretrained(out, dtype=torch.float32)
    ids = torch.tensor([[11, 12, 13], [14, 15, 16]])
    summary = torch.tensor([7, 8])
    with torch.no_grad():
        states = model.model.base_model(
            input_ids=torch.cat([ids, summary.expand(2, 2)], dim=1), output_hidden_states=True
        ).hidden_states
    expected = torch.cat([states[1][:, 1:3].mean(dim=1), states[2][:, -1]], dim=1)
    counted = torch.tensor([[False, True, True]] * 2)
    mask = torch.ones_like(ids)
    got = hidden_features(model.model, ids, mask, counted, summary, (1, 2))
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
    want = hidden_features(model, alone, everything, everything.bool(), summary, (1, 2))
    got = hidden_features(model, ids, mask, mask.bool(), summary, (1, 2))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_sixty_four_experts_are_told_apart_and_each_answers_as_if_alone(make, merged, tmp_path):
    names = tuple(f"e{i:02d}" for i in range(64))
    family = make(make=lambda: pico.llama(hidden_size=64, num_hidden_layers=1), experts=names)
    out = merged(family.config(route="all", density=1.0))
    data = {}
    for i, name in enumerate(names):
        pair = f"w{i % 60}", f"w{(i + 7 + i // 60) % 60}"
        texts = [" ".join(pair[(n >> k) & 1] for k in range(4)) for n in range(5, 11)]
        data[name] = tmp_path / f"{name}.jsonl"
        data[name].write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    calibrate(out, data, kind="embedding", head="mahalanobis")
    model = MediatorModel.from_pretrained(out)
    requests = [f"w{i % 60} w{(i + 7 + i // 60) % 60}" for i in range(64)]
    decision = model.route(requests)
    assert decision.weights.argmax(dim=1).tolist() == list(range(64))
    model.policy = "hard"
    for i in (0, 31, 63):
        ids, mask = model.tokenize([requests[i]])
        alone = AutoModelForCausalLM.from_pretrained(family.experts[names[i]])
        want = alone.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        model.ood_threshold = float("inf")
        assert torch.equal(model.generate(ids, mask, max_new_tokens=4, do_sample=False), want)
