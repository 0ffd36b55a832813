"""`prompts:` in a merge configuration, through the stock command."""

import json
from functools import partial

import pico
import pytest
import torch
import yaml
from click.testing import CliRunner
from own_code import edit_json, give_model_code
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_mediator import MediatorModel
from mergekit_mediator.cli.inspection import inspect_figures, inspect_report
from mergekit_mediator.cli.main import main
from mergekit_mediator.merge import lessons
from mergekit_mediator.models.prompts import render
from mergekit_mediator.store.manifest import read_manifest
from mergekit_mediator.store.verification import verify_files
from mergekit_mediator.tune import fit as distil
from mergekit_mediator.tune.teacher import answer

short_answers = partial(answer, answer_tokens=8)
TEXTS = [f"w{i} w{(7 * i) % 60} w{(3 * i + 1) % 60}" for i in range(16)]


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    """A file of prompts, and answers that are short enough for a test."""
    monkeypatch.setattr(lessons, "answer", short_answers)
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    return path


def tuned(family, prompts, *names, **settings):
    config = family.config(**settings)
    for entry in config["models"]:
        if entry["parameters"]["expert"] in names:
            entry["parameters"]["prompts"] = (
                prompts if isinstance(prompts, int | float) else str(prompts)
            )
    return config


def expert_bytes(out, name):
    return (out / f"mediator/experts/{name}.safetensors").read_bytes()


def test_experts_with_prompts_change_and_no_others(family, merged, prompts):
    plain = merged(family.config(bits=2, route="all"), name="plain")
    out = merged(tuned(family, prompts, "math", "code", bits=2, route="all"))
    entries = {entry.name: entry.tuned for entry in read_manifest(out).experts}
    for name in ("math", "code"):
        assert entries[name].prompts == len(TEXTS)
        assert entries[name].divergence_after < entries[name].divergence_before
        assert expert_bytes(out, name) != expert_bytes(plain, name)
    assert entries["chat"] is None
    assert expert_bytes(out, "chat") == expert_bytes(plain, "chat")
    assert (out / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    assert not list((out / "mediator/experts").glob("*.tuned"))
    verify_files(out, read_manifest(out))


# bits of low rank plus sparse, and of random signs relative to another dense expert, which pico vectors fill
@pytest.mark.parametrize(
    "form", [{"bits": 2}, {"bits": 3, "values": "random_sign"}], ids=["steps", "signs"]
)
def test_the_model_that_is_served_is_as_near_as_the_manifest_says(family, merged, prompts, form):
    out = merged(tuned(family, prompts, "math", route="all", **form))
    entry = read_manifest(out).experts[0]
    model = MediatorModel.from_pretrained(out, dtype=torch.float32)
    expert = AutoModelForCausalLM.from_pretrained(family.experts["math"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = [render(tokenizer, text) for text in TEXTS]
    answers = short_answers(expert, ids, pad=0)[:: distil.HELD_OUT]
    with model.mixture({"math": 1.0}) as mixed:
        served = distil.divergence(mixed, answers)
    assert served == pytest.approx(entry.tuned.divergence_after, rel=0.1)


@pytest.mark.parametrize("architecture", ["llama_tied", "gemma3", "gpt2", "qwen3_moe"])
def test_every_architecture_can_be_tuned(make, merged, prompts, architecture):
    family = make(pico.ARCHITECTURES[architecture])
    out = merged(tuned(family, prompts, "math", bits=3, route="all"))
    entry = read_manifest(out).experts[0]
    assert entry.tuned.divergence_after < entry.tuned.divergence_before


def test_averaged_layers_stay_bit_for_bit_as_they_are(family, merged, read, prompts):
    settings = {"bits": 2, "routed_layers": "1"}
    plain = merged(family.config(**settings), name="plain")
    out = merged(tuned(family, prompts, "math", **settings))
    assert expert_bytes(out, "math") != expert_bytes(plain, "math")
    dense, expected = read(out), read(plain)
    assert dense.keys() == expected.keys()
    assert all(torch.equal(dense[name], expected[name]) for name in expected)
    with MediatorModel.from_pretrained(out).mixture({"math": 1.0}) as mixed:
        changed = {n for n, w in mixed.state_dict().items() if not torch.equal(w, expected[n])}
    (layer,) = read_manifest(out).routed_layers
    assert changed
    assert changed <= set(layer.weights)


def test_a_budget_holds_for_tuned_experts(make, merged, prompts):
    wide = make(lambda: pico.llama(hidden_size=128, intermediate_size=384, head_dim=64))
    out = merged(tuned(wide, prompts, "math", "code", "chat", budget="1.5x"))
    ours = {"README.md", "mergekit_config.yml"}
    files = [p for p in out.iterdir() if p.is_file() and p.name not in ours]
    dense = sum(p.stat().st_size for p in files)
    assert sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) <= 1.5 * dense


def test_prompts_measure_random_signs_and_change_nothing(family, merged, prompts):
    config = {"bits": 3, "values": "random_sign", "route": "all"}
    plain, out = (
        merged(family.config(**config), name="plain"),
        merged(tuned(family, prompts, "math", **config)),
    )
    entry = read_manifest(out).experts[0].tuned
    assert entry.divergence_after == entry.divergence_before > 0
    assert expert_bytes(out, "math") == expert_bytes(plain, "math")


def test_signs_come_nearer_to_the_part_that_is_measured(make, merged, prompts):
    wide = make(lambda: pico.llama(hidden_size=128, intermediate_size=384, head_dim=64))
    out = merged(tuned(wide, prompts, "math", values="random_sign", keep=0.9))
    kept = read_manifest(out).parameters["kept"]
    assert kept["math"]["measured"] <= 1
    assert kept["code"].get("measured") is None
    verify_files(out, read_manifest(out))


def test_equal_merges_give_equal_files(family, merged, prompts):
    config = tuned(family, prompts, "math", bits=2, route="all")
    first, second = merged(config, name="first"), merged(config, name="second")
    assert expert_bytes(first, "math") == expert_bytes(second, "math")


def test_the_card_shows_no_directory_of_this_machine(family, merged, prompts):
    out = merged(tuned(family, prompts, "math", bits=2, route="all"))
    assert str(prompts.parent) not in (out / "README.md").read_text()
    assert "prompts: prompts.jsonl" in (out / "README.md").read_text()


def test_inspect_says_what_tuning_did(family, merged, prompts):
    out = merged(tuned(family, prompts, "math", bits=2, route="all"))
    figures = inspect_figures(out, read_manifest(out))
    first, second, _ = figures["experts"]
    assert first["tuned"]["prompts"] == len(TEXTS)
    assert second["tuned"] is None
    before, after = (first["tuned"][f"divergence_{when}"] for when in ("before", "after"))
    assert f"{before:.2g} to {after:.2g} by {len(TEXTS)} prompts" in inspect_report(figures)


def plan(config, tmp_path):
    path = tmp_path / "plan.yml"
    path.write_text(yaml.safe_dump(config))
    return CliRunner().invoke(main, ["plan", str(path), "--json"])


def test_a_plan_adds_the_whole_model_and_its_activations_where_experts_are_tuned(
    family, prompts, read, tmp_path
):
    def peak(config):
        return json.loads(plan(config, tmp_path).output)["peak_memory"]

    parameters = sum(weight.numel() for weight in read(family.base).values())
    width, layers, vocabulary = 16, 5, pico.VOCABULARY
    embedding = vocabulary * width  # the largest weight
    process = 700_000_000 + 4 * 2 * parameters  # with four models in bfloat16, mapped
    shard, approximating = 2 * parameters, 20 * embedding
    assert peak(family.config(bits=2)) == process + shard + approximating
    model = 4 * parameters + 8 * embedding  # in float32, with a gradient
    codes = 20 * parameters // 4
    activations = 4 * 512 * (25 * width * layers + 2 * vocabulary)
    with_prompts = peak(tuned(family, prompts, "math", bits=2))
    assert with_prompts == process + model + codes + activations


@pytest.mark.parametrize(
    ("length", "said"), [(1, "gives no answer to"), (4, "gives the same answer of 4 tokens to")]
)
def test_an_expert_that_gives_all_prompts_the_same_answer_is_warned_of(
    family, mergekit_yaml, prompts, monkeypatch, tmp_path, length, said
):
    def alike(model, ids, pad, step):
        return answer(model, [ids[0]] * len(ids), pad, step, answer_tokens=length)

    monkeypatch.setattr(lessons, "answer", alike)
    config = tuned(family, prompts, "math", bits=2, route="all")
    output = mergekit_yaml(config, tmp_path / "out").output
    (line,) = [line for line in output.splitlines() if "warning: model " in line]
    assert f"/math: prompts: it {said} all 16 prompts, from which tuning learns nothing" in line
    assert line.endswith("give prompts of the task, worded as in its training")


def test_a_plan_refuses_too_few_prompts(family, prompts, tmp_path):
    prompts.write_text("")
    result = plan(tuned(family, prompts, "math", bits=2), tmp_path)
    assert result.exit_code == 1
    assert "at least 5 prompts required" in result.output


def test_an_expert_that_is_the_dense_one_stays_as_it_is(family, merged, prompts):
    config = tuned(family, prompts, "math", bits=2, route="all")
    for entry in config["models"][1:]:
        entry["parameters"]["weight"] = 0
    entry = read_manifest(merged(config)).experts[0]
    assert entry.tuned.divergence_after == entry.tuned.divergence_before < 0.1


@pytest.mark.parametrize(
    ("settings", "content", "message"),
    [
        (
            {"density": 0.1},
            None,
            "prompts: they tune experts that are stored by `keep`, `bits` or a `budget`",
        ),
        ({"bits": 2}, "", "prompts.jsonl: at least 5 prompts required, got 0"),
        ({"bits": 2}, "{", "prompts.jsonl line 1: no JSON"),
        ({"bits": 2}, None, "nowhere.jsonl"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused_before_weights_are_read(
    family, refused, prompts, monkeypatch, settings, content, message
):
    def unread(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr("mergekit_mediator.merge.loaders.OpenInputs.load", unread)
    if content is not None:
        prompts.write_text(content)
    path = prompts.with_name("nowhere.jsonl") if "nowhere" in message else prompts
    assert message in refused(tuned(family, path, "math", **settings))


def test_prompts_belong_to_one_model_and_are_one_file(family, refused, prompts):
    assert "'prompts' belongs to one model's" in refused(family.config(prompts="p.jsonl", bits=2))
    config = tuned(family, prompts, "math", bits=2)
    config["models"][0]["parameters"]["prompts"] = ["a", "b"]
    assert "prompts: one value required" in refused(config)


def test_an_expert_without_prompts_writes_texts_itself(family, merged, tmp_path):
    config = tuned(family, 16, "math", bits=2, route="all")
    first, second = merged(config, name="first"), merged(config, name="second")
    entry = read_manifest(first).experts[0]
    assert (entry.tuned.prompts, entry.tuned.data, entry.tuned.written) == (16, None, True)
    assert entry.tuned.divergence_after < entry.tuned.divergence_before
    assert expert_bytes(first, "math") == expert_bytes(second, "math")
    report = inspect_report(inspect_figures(first, read_manifest(first)))
    assert "by 16 texts of its own" in report
    peak = json.loads(plan(config, tmp_path).output)["peak_memory"]
    plain = family.config(bits=2, route="all")
    assert peak > json.loads(plan(plain, tmp_path).output)["peak_memory"]


def test_a_number_for_all_experts_holds_for_those_without_prompts(family, merged, prompts):
    config = tuned(family, prompts, "code", bits=2, route="all")
    config["parameters"]["prompts"] = 8
    out = merged(config)
    found = {entry.name: entry.tuned for entry in read_manifest(out).experts}
    assert [found[name].written for name in ("math", "code", "chat")] == [True, False, True]
    assert [found[name].prompts for name in ("math", "code", "chat")] == [8, len(TEXTS), 8]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (4, "at least 5 texts that the expert writes required, or a file of prompts, got 4"),
        (0, "at least 5 texts that the expert writes required, or a file of prompts, got 0"),
        (64.5, "a file, or the number of texts that the expert writes, required, got 64.5"),
    ],
)
def test_a_number_of_texts_that_is_none_is_refused(family, refused, given, message):
    assert f"prompts: {message}" in refused(tuned(family, given, "math", bits=2))


def test_a_tokenizer_that_begins_no_text_is_refused(make, refused):
    family = make()
    path = family.base / "tokenizer_config.json"
    edit_json(path, bos_token=None, eos_token=None)
    edit_json(family.base / "tokenizer.json", post_processor=None)
    message = refused(tuned(family, 16, "math", bits=2))
    assert "prompts: the tokenizer has no token that begins or ends a text" in message


def test_a_prompt_that_is_too_long_is_refused(family, refused, prompts):
    lines = [json.dumps({"prompt": " ".join(["w1"] * 70)})] * 6
    prompts.write_text("\n".join(lines))
    message = refused(tuned(family, prompts, "math", bits=2, route="all"))
    assert f"model {family.experts['math']}: prompts: a prompt of 7" in message
    assert "leaves no room for an answer: the model reads 64" in message


def test_models_that_cannot_be_tuned_are_refused_before_weights_are_read(
    make, refused, prompts, monkeypatch
):
    def unread(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr("mergekit_mediator.merge.loaders.OpenInputs.load", unread)
    no_tokenizer, unknown, untemplated = make(), make(), make()
    for path in no_tokenizer.base.glob("tokenizer*"):
        path.unlink()
    message = refused(tuned(no_tokenizer, prompts, "math", bits=2))
    assert "prompts: a tokenizer required, but the base model has none: add one" in message
    for folder in (unknown.base, *unknown.experts.values()):
        give_model_code(folder)
        names = {"AutoConfig": "configuration_own.OwnConfig"}  # and no causal language model
        edit_json(folder / "config.json", auto_map=names)
    message = refused(tuned(unknown, prompts, "math", bits=2), "--trust-remote-code")
    assert "prompts: tuning requires a causal language model that transformers" in message
    (untemplated.base / "chat_template.jinja").unlink()
    turns = [{"role": "user", "content": "w1"}] * 3
    prompts.write_text((json.dumps({"messages": turns}) + "\n") * 8)
    message = refused(tuned(untemplated, prompts, "math", bits=2))
    assert f"model {untemplated.experts['math']}: prompts: a conversation of 3 messages" in message
