import json
import shutil

import fake_hub
import pytest
import records
from commands import call
from huggingface_hub import ModelCard
from routed_pico import build

from mergekit_mediator.errors import ArtifactError, ShareError
from mergekit_mediator.share.card_examples import loading_from
from mergekit_mediator.share.push import prepare, push
from mergekit_mediator.store.digests import digest
from mergekit_mediator.store.evaluation import Evaluation, loaded_digest, write_evaluation
from mergekit_mediator.store.manifest import (
    EVALUATION,
    MANIFEST,
    PICTURES,
    read_manifest,
    write_manifest,
)
from mergekit_mediator.store.verification import verify_files


@pytest.fixture
def copy(artifact, tmp_path):
    """The artifact, to be changed."""
    shutil.copytree(artifact, tmp_path / "copy")
    return tmp_path / "copy"


def restored(hub, root, name="me/merged", revision="main"):
    """The files of a repository, written to a directory."""
    for path, content in hub.repositories[name].files(revision).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def test_a_pushed_artifact_verifies_and_comes_in_one_commit(hub, artifact, tmp_path):
    address = push(prepare(artifact), "me/merged")
    repository = hub.repositories["me/merged"]
    assert len(repository.messages) == 2  # that of the new repository, and ours
    assert address == f"{hub.url}/me/merged/commit/{repository.branches['main']}"
    copy = restored(hub, tmp_path / "copy")
    verify_files(copy, read_manifest(copy))
    assert (copy / "README.md").read_bytes() == (artifact / "README.md").read_bytes()


def test_no_directory_of_this_machine_is_sent(hub, artifact, family):
    assert str(family.base.parent).encode() in (artifact / MANIFEST).read_bytes()
    push(prepare(artifact), "me/merged")
    files = hub.repositories["me/merged"].files()
    assert not [
        name for name, content in files.items() if str(family.base.parent).encode() in content
    ]
    manifest = json.loads(files[MANIFEST])
    assert manifest["base"]["source"] == "base"
    assert [e["source"] for e in manifest["experts"]] == ["math", "code", "chat"]


def test_the_card_that_is_sent_loads_from_the_repository(hub, copy):
    before = (copy / "README.md").read_text()
    assert call("push", copy, "me/merged").exit_code == 0
    card = hub.repositories["me/merged"].files()["README.md"].decode()
    assert 'model = MediatorModel.from_pretrained("me/merged")' in card
    assert (
        'model = AutoModelForCausalLM.from_pretrained("me/merged", trust_remote_code=True)' in card
    )
    assert "vllm serve me/merged --enable-lora" in card
    assert 'from_pretrained("out")' in before
    assert 'from_pretrained("out")' in (copy / "README.md").read_text()


def test_a_relative_directory_that_is_gone_is_said_before_it_is_sent_as_a_repository(hub, copy):
    manifest = read_manifest(copy)
    base = manifest.base.model_copy(update={"source": "models/base"})
    write_manifest(copy, manifest.model_copy(update={"base": base}))
    result = call("push", copy, "me/merged")
    assert result.exit_code == 0
    (note,) = [line for line in result.stderr.splitlines() if line.startswith("note: models/base")]
    assert "no such directory here, and no such repository on the Hub, or it is private" in note
    hub.repositories["models/base"] = fake_hub.Repository()
    assert "note: models/base" not in call("push", copy, "me/merged").stderr


def test_files_of_prompts_are_sent_by_their_names(hub, copy, tmp_path):
    (tmp_path / "math.jsonl").write_text("")
    config = copy / "mergekit_config.yml"
    config.write_text(f"prompts: {{math: {tmp_path}/math.jsonl}}\n{config.read_text()}")
    manifest = read_manifest(copy)
    files = {**manifest.files, config.name: digest(config)}
    write_manifest(copy, manifest.model_copy(update={"files": files}))
    push(prepare(copy), "me/merged")
    sent = hub.repositories["me/merged"].files()["mergekit_config.yml"].decode()
    assert sent.startswith("prompts: {math: math.jsonl}\n")


def test_a_push_that_was_interrupted_goes_on_where_it_was(hub, artifact):
    hub.fails["PUT /lfs"] = 400
    with pytest.raises(ShareError, match="me/merged"):
        push(prepare(artifact), "me/merged")
    hub.fails.clear()
    hub.fails["POST .*/commit/"] = 400
    with pytest.raises(ShareError):
        push(prepare(artifact), "me/merged")
    assert set(hub.repositories["me/merged"].files()) == {".gitattributes"}
    hub.fails.clear()
    uploads = [r for r in hub.requests if r.startswith("PUT")]
    push(prepare(artifact), "me/merged")
    assert [r for r in hub.requests if r.startswith("PUT")] == uploads  # each is there already


def test_files_of_the_last_model_go_and_those_of_people_stay(hub, artifact):
    push(prepare(artifact), "me/merged")
    repository = hub.repositories["me/merged"]
    theirs = {"notes.md": b"mine", "model-00009.safetensors": b"old", "adapter_config.json": b"old"}
    repository.commit({**repository.files(), **theirs})
    push(prepare(artifact), "me/merged")
    assert theirs.keys() & repository.files().keys() == {"notes.md"}


@pytest.mark.parametrize(
    ("files", "text"),
    [
        (
            {"config.json": b"{}"},
            r"me/other: already holds a model \(config.json\): choose another",
        ),
        ({MANIFEST: b"{}"}, "me/other: already holds an artifact that cannot be read"),
    ],
)
def test_another_model_is_not_replaced_unasked(hub, artifact, files, text):
    hub.repositories["me/other"] = fake_hub.Repository()
    hub.repositories["me/other"].commit(files)
    with pytest.raises(ShareError, match=text):
        push(prepare(artifact), "me/other")
    assert hub.repositories["me/other"].files() == files
    push(prepare(artifact), "me/other", overwrite=True)
    assert MANIFEST in hub.repositories["me/other"].files()


def test_an_artifact_of_another_base_is_not_replaced_unasked(pushed, make, tmp_path):
    build(tmp_path / "second", make(seed=7), density=0.3)
    with pytest.raises(
        ShareError, match="me/merged: already holds an artifact of another base, base"
    ):
        push(prepare(tmp_path / "second"), "me/merged")


def test_a_branch_and_a_pull_request(pushed, artifact):
    main = pushed.repositories["me/merged"].branches["main"]
    push(prepare(artifact), "me/merged", revision="v2")
    address = push(prepare(artifact), "me/merged", create_pr=True)
    branches = pushed.repositories["me/merged"].branches
    assert set(branches) == {"main", "v2", "refs/pr/1"}
    assert branches["main"] == main
    assert address.endswith("/discussions/1")


@pytest.mark.parametrize(
    ("token", "text"),
    [
        (
            "",
            r"me/merged: the Hub does not know you \(.*\): log in with `hf auth login`, or set HF_TOKEN",
        ),
        (
            fake_hub.READER,
            r"me/merged: you may not do this there \(.*\): use a token with the right",
        ),
    ],
)
def test_who_may_not_write_is_told_what_to_do(hub, artifact, monkeypatch, token, text):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
    with pytest.raises(ShareError, match=text):
        push(prepare(artifact), "me/merged")


def test_a_commit_of_somebody_else_meanwhile_is_not_overwritten(pushed, artifact, monkeypatch):
    repository = pushed.repositories["me/merged"]

    def meanwhile(*arguments):
        repository.commit({**repository.files(), "new.md": b""})

    monkeypatch.setattr("mergekit_mediator.share.push._check_owner", meanwhile)
    with pytest.raises(ShareError, match="somebody has changed the repository meanwhile"):
        push(prepare(artifact), "me/merged")
    assert "new.md" in repository.files()


def test_what_does_not_verify_is_not_sent(hub, copy):
    (copy / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"config.json: .* bytes required"):
        prepare(copy)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (f"token: {fake_hub.WRITER}", "README.md: line 1 holds a token of the Hub: remove it"),
        ("from /home/ann/models", "README.md: line 1 names a directory of this machine, /home/ann"),
    ],
)
def test_secrets_and_home_directories_are_not_sent(copy, line, text):
    (copy / "README.md").write_text(line)
    with pytest.raises(ShareError, match=text):
        prepare(copy)


def test_a_name_that_is_none_of_a_repository_is_refused(hub, artifact):
    with pytest.raises(
        ShareError, match="a b: is not the name of a repository: USER/NAME required"
    ):
        push(prepare(artifact), "a b")


def keep_results(root, **changes):
    """Write the record of an evaluation of the artifact."""
    routing = {"chosen": dict.fromkeys(read_manifest(root).expert_names, 2), "entropy": 0.1}
    digest = loaded_digest(read_manifest(root))
    figures = records.evaluation(artifact=digest, routing={"math": routing, "code": routing})
    write_evaluation(root, Evaluation.model_validate(figures | changes))


def test_results_and_pictures_are_sent_with_the_card_that_shows_them(hub, copy):
    keep_results(copy)
    assert call("push", copy, "me/merged").exit_code == 0
    files = hub.repositories["me/merged"].files()
    layers, router, results = PICTURES
    assert {EVALUATION, layers, results} <= set(files)
    assert router not in files  # the router is not calibrated
    card = files["README.md"].decode()
    assert f"]({layers})" in card
    assert "| `mediator` | 93.8 |" in card
    (model,) = ModelCard(card).data.to_dict()["model-index"]
    assert [r["dataset"]["name"] for r in model["results"]] == ["math", "code"]


def test_results_of_other_files_are_not_sent_and_those_sent_before_go(hub, copy):
    keep_results(copy)
    assert call("push", copy, "me/merged").exit_code == 0
    keep_results(copy, artifact="0" * 64)
    result = call("push", copy, "me/merged")
    assert result.exit_code == 0
    assert "the artifact has changed since it was evaluated" in result.stderr
    files = hub.repositories["me/merged"].files()
    assert not {EVALUATION, PICTURES[2]} & set(files)
    assert "model-index" not in files["README.md"].decode()


def test_a_card_that_people_wrote_is_sent_as_it_is(hub, copy):
    (copy / "README.md").write_text("# Mine\n")
    result = call("push", copy, "me/merged")
    assert result.exit_code == 0
    assert "README.md: stays as it is" in result.stderr
    assert hub.repositories["me/merged"].files()["README.md"] == b"# Mine\n"


def test_a_card_that_cannot_be_brought_up_to_date_does_not_stop_a_push(hub, copy):
    card = (copy / "README.md").read_bytes().replace(b"---\n", b"---\na: [\n", 1)
    (copy / "README.md").write_bytes(card)
    result = call("push", copy, "me/merged")
    assert result.exit_code == 0
    assert "warning: the card stays as it is: " in result.stderr
    sent = hub.repositories["me/merged"].files()["README.md"]
    assert sent.decode() == loading_from(card.decode(), "me/merged")


def test_a_directory_in_the_results_is_not_sent(copy):
    keep_results(copy, sources={"math": "/home/ann/math.jsonl", "code": "code"})
    with pytest.raises(ShareError, match=r"evaluation\.json: line \d+ names a directory"):
        prepare(copy)


def test_the_command_shows_what_it_sends_and_a_dry_run_sends_nothing(hub, artifact):
    result = call("push", artifact, "me/merged", "--dry-run")
    assert result.exit_code == 0
    assert "mediator/experts/math.safetensors" in result.stdout
    assert result.stdout.splitlines()[-1] == "nothing was sent: --dry-run"
    assert hub.requests == []
    result = call("push", artifact, "me/merged", "--private")
    assert result.stdout.splitlines()[-1].startswith(f"sent: {hub.url}/me/merged/commit/")
    assert hub.repositories["me/merged"].private


def test_a_hub_that_cannot_be_reached_is_named_in_one_line(hub, artifact, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    result = call("push", artifact, "me/merged")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: me/merged: the Hub cannot be used (")
