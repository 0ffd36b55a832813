"""A model's own code runs only if the user has allowed it, and the user is never asked."""

import io
import json
import shutil
from functools import partial

import pytest
import torch
import yaml
from click.testing import CliRunner
from hostile import sign
from own_code import give_model_code, give_tokenizer_code
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from mergekit_mediator import MediatorModel, remote
from mergekit_mediator.cli.main import main
from mergekit_mediator.errors import ArtifactError, MediatorError
from mergekit_mediator.models.loading import load_plain, load_tokenizer
from mergekit_mediator.store.manifest import read_manifest
from mergekit_mediator.store.verification import verify_files

GREEDY = {"max_new_tokens": 4, "do_sample": False}
PLANTS = {"model": give_model_code, "tokenizer": give_tokenizer_code}
WORDS = {"math": range(0, 6), "code": range(20, 26), "chat": range(40, 46)}


@pytest.fixture(scope="module")
def original(make, tmp_path_factory):
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_mediator.merge.run import run

    out = tmp_path_factory.mktemp("consent") / "out"
    config = make(dtype=torch.float32).config(route="all", density=0.5)
    run(MergeConfiguration.model_validate(config), str(out), MergeOptions(quiet=True))
    return out


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """The file that planted code writes. Every question whether the code may run is answered with yes."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return tmp_path / "it-ran"


@pytest.fixture(params=PLANTS)
def planted(original, tmp_path, mark, request):
    """A copy of the artifact with a stranger's code and matching digests, and the kind of the code."""
    out = shutil.copytree(original, tmp_path / "planted")
    sign(out, *PLANTS[request.param](out, mark))
    return out, request.param


@pytest.fixture
def data(tmp_path):
    """The options of `calibrate` for files of prompts of each expert."""
    files = {}
    for name, words in WORDS.items():
        lines = [json.dumps({"prompt": f"w{i} w{i + 1} w{i}"}) for i in words]
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("\n".join(lines))
    return [text for name, path in files.items() for text in ("--data", f"{name}={path}")]


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "task.jsonl"
    lines = [json.dumps({"prompt": f"w{i} w2", "answer": "w3"}) for i in range(4)]
    path.write_text("\n".join(lines))
    return ["--task", f"math={path}", "--limit", "2", "--tune", "2"]


def command(*arguments):
    """The output of a command whose questions are answered with yes."""
    result = CliRunner().invoke(main, [str(a) for a in arguments], input="y\n" * 20)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code:
        raise MediatorError(result.output.strip().splitlines()[-1])
    return result.output


ENTRANCES = {
    "from_pretrained": lambda out, *_: MediatorModel.from_pretrained(out),
    "from_pretrained, None": lambda out, *_: MediatorModel.from_pretrained(
        out, trust_remote_code=None
    ),
    "from_pretrained, unverified": lambda out, *_: MediatorModel.from_pretrained(out, verify=False),
    "attach": lambda out, *_: MediatorModel.attach(LlamaForCausalLM.from_pretrained(out), out),
    "remote.generate": lambda out, *_: remote.generate(
        LlamaForCausalLM.from_pretrained(out), torch.tensor([[5, 6]]), **GREEDY
    ),
    "load_plain": lambda out, *_: load_plain(out),
    "load_tokenizer": lambda out, *_: load_tokenizer(out),
    "generate": lambda out, *_: command("generate", out, "w1 w2"),
    "calibrate": lambda out, data, _: command("calibrate", out, *data),
    "evaluate": lambda out, _, task: command("evaluate", out, *task),
    "inspect": lambda out, *_: command("inspect", out),
    "verify": lambda out, *_: command("verify", out),
}


# The entrances that need no code of the artifact: they load neither its model nor its tokenizer from it.
WITHOUT_CODE = {
    "model": {"attach", "remote.generate", "load_tokenizer", "inspect", "verify"},
    "tokenizer": {"load_plain", "inspect", "verify"},
}


@pytest.mark.parametrize("name", ENTRANCES)
def test_planted_code_does_not_run_and_is_refused_where_it_is_needed(
    planted, mark, data, task, name
):
    out, kind = planted
    if name in WITHOUT_CODE[kind]:
        ENTRANCES[name](out, data, task)
    else:
        with pytest.raises(MediatorError) as caught:
            ENTRANCES[name](out, data, task)
        message = str(caught.value)
        assert f"{out}: needs code that comes with it, which runs only where you" in message
        assert "trust_remote_code=True, or --trust-remote-code to a command" in message
        assert "\n" not in message
    assert not mark.exists()


@pytest.mark.parametrize("option", ["--experts", "--base", "--rivals"])
def test_evaluate_runs_no_code_of_base_and_experts(original, family, tmp_path, mark, task, option):
    base = shutil.copytree(family.base, tmp_path / "base")
    give_model_code(base, mark)
    values = {"--base": [base], "--rivals": ["average", "--base", base], "--experts": []}
    places = ["--base", base] if option == "--experts" else []
    for name, path in family.experts.items():
        places += ["--expert", f"{name}={path}"]
    with pytest.raises(MediatorError, match="needs code that comes with it"):
        command("evaluate", original, *task, option, *values[option], *places)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["merge", "plan", "mergekit-yaml"])
def test_a_merge_runs_no_code_of_its_inputs(make, tmp_path, mark, mergekit_yaml, name):
    family = make()
    give_model_code(family.base, mark)
    config = tmp_path / "planted.yml"
    config.write_text(yaml.safe_dump(family.config()))
    if name == "mergekit-yaml":
        message = mergekit_yaml(family.config(), tmp_path / "out").output
    else:
        with pytest.raises(MediatorError) as caught:
            command(name, config, *([tmp_path / "out"] if name == "merge" else []))
        message = str(caught.value)
    assert f"base_model {family.base}: needs code that comes with it" in message
    assert "then give --trust-remote-code" in message
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": None}, {"trust_remote_code": False}])
def test_custom_generate_of_a_stranger_does_not_run(original, tmp_path, mark, trust):
    stranger = tmp_path / "stranger" / "custom_generate"
    stranger.mkdir(parents=True)
    text = f"import pathlib\npathlib.Path({str(mark)!r}).write_text('ran')\n"
    (stranger / "generate.py").write_text(text + "def generate(model, **kwargs): return 1\n")
    model = MediatorModel.from_pretrained(original)
    ids, mask = model.tokenize(["w1 w2"])
    for call in (model.generate, model.model.generate):
        with pytest.raises(ArtifactError, match=f"{stranger.parent}: needs code that comes with"):
            call(ids, attention_mask=mask, custom_generate=str(stranger.parent), **trust, **GREEDY)
    assert not mark.exists()
    model.generate(
        ids, mask, mixture="math", custom_generate=str(stranger.parent), trust_remote_code=True
    )
    assert mark.exists()


def test_custom_generate_of_the_artifact_is_not_loaded_without_consent(original, tmp_path, mark):
    out = shutil.copytree(original, tmp_path / "out")
    text = (out / "custom_generate/generate.py").read_text()
    mine = f"import pathlib\npathlib.Path({str(mark)!r}).write_text('ran')\n"
    (out / "custom_generate/generate.py").write_text(text + mine)
    sign(out, "custom_generate/generate.py")
    for load in (MediatorModel.from_pretrained, load_plain):
        model = load(out)
        model.generate(torch.tensor([[5, 6]]), **GREEDY)
    assert not mark.exists()


def test_a_stock_tokenizer_with_code_beside_it_is_read_as_the_stock_one(original, tmp_path, mark):
    """transformers does the same with models: a class that it knows needs no code."""
    out = shutil.copytree(original, tmp_path / "out")
    stock = json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"]
    names = give_tokenizer_code(out, mark)
    content = json.loads((out / "tokenizer_config.json").read_text())
    content["tokenizer_class"] = stock
    (out / "tokenizer_config.json").write_text(json.dumps(content))
    sign(out, *names)
    model = MediatorModel.from_pretrained(out)
    assert model.tokenizer("w1").input_ids == [5]
    assert not mark.exists()


@pytest.fixture(scope="module")
def own_artifact(make, tmp_path_factory):
    """An artifact of a base model with its own code, merged with consent, and its family."""
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_mediator.merge.run import run

    family = make(dtype=torch.float32)
    for folder in (family.base, *family.experts.values()):
        give_model_code(folder)
        give_tokenizer_code(folder)
    config = MergeConfiguration.model_validate(family.config(route="all", density=1.0))
    out = tmp_path_factory.mktemp("own") / "out"
    run(config, str(out), MergeOptions(quiet=True, trust_remote_code=True))
    return out, family


def test_an_artifact_holds_the_code_that_it_needs_with_digests(own_artifact):
    out, family = own_artifact
    files = read_manifest(out).files
    for name in ("configuration_own", "modeling_own", "layers_own", "tokenization_own"):
        assert (out / f"{name}.py").read_text() == (family.base / f"{name}.py").read_text()
        assert f"{name}.py" in files
    verify_files(out, read_manifest(out))


def test_an_artifact_of_a_base_with_code_of_its_own_works_with_consent(own_artifact, read):
    out, family = own_artifact
    with pytest.raises(ArtifactError, match="needs code that comes with it"):
        MediatorModel.from_pretrained(out)
    model = MediatorModel.from_pretrained(out, trust_remote_code=True)
    assert type(model.model).__name__ == "OwnForCausalLM"
    assert model.tokenizer.own
    expert = read(family.experts["math"])
    with model.mixture("math") as mixed:
        for name, weight in mixed.state_dict().items():
            assert torch.equal(weight, expert[name])
    ids, mask = model.tokenize(["w3 w41 w5 w9"])
    best = model.experts[int(model.route(ids, mask).weights.argmax())]
    routed = model.model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(routed, model.generate(ids, mask, mixture=best, **GREEDY))


def test_transformers_own_loader_routes_generation_of_such_an_artifact(own_artifact):
    out, _ = own_artifact
    named = MediatorModel.from_pretrained(out, trust_remote_code=True)
    ids, mask = named.tokenize(["w3 w41 w5 w9"])
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    result = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(result, named.generate(ids, mask, **GREEDY))
    assert model.mediator.tokenizer.own


def test_the_commands_take_consent(own_artifact, tmp_path, data, task):
    out = shutil.copytree(own_artifact[0], tmp_path / "out")
    for arguments in (
        ["generate", out, "w1 w2", "--max-new-tokens", "3"],
        ["calibrate", out, *data],
        ["evaluate", out, *task, "--experts", "--rivals", "extract_lora", "--rank", "2"],
    ):
        with pytest.raises(MediatorError, match="needs code that comes with it"):
            command(*arguments)
        assert command(*arguments, "--trust-remote-code")


def test_tuning_takes_the_consent_of_the_merge(own_artifact, tmp_path, data, monkeypatch):
    from mergekit_mediator.merge import lessons
    from mergekit_mediator.tune.teacher import answer

    monkeypatch.setattr(lessons, "answer", partial(answer, answer_tokens=4))
    config = own_artifact[1].config(route="all", bits=2)
    config["models"][0]["parameters"]["prompts"] = data[1].partition("=")[2]
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(config))
    command("merge", path, tmp_path / "tuned", "--trust-remote-code", "--quiet")
    tuned = read_manifest(tmp_path / "tuned").experts[0].tuned
    assert tuned.divergence_after < tuned.divergence_before


def test_attach_takes_consent_for_the_tokenizer(own_artifact):
    out, _ = own_artifact
    model = load_plain(out, trust_remote_code=True)
    with pytest.raises(ArtifactError, match="needs code that comes with it"):
        MediatorModel.attach(model, out)
    assert MediatorModel.attach(model, out, trust_remote_code=True).tokenizer.own
