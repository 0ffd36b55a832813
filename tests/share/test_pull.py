import re

import fake_hub
import pytest
import torch
from commands import call, figures
from routed_pico import build
from transformers import AutoModelForCausalLM

from mergekit_mediator import MediatorModel
from mergekit_mediator.errors import ArtifactError, MixtureError, ShareError
from mergekit_mediator.share.pull import Repository, fetch_artifact
from mergekit_mediator.share.push import prepare, push
from mergekit_mediator.store.manifest import MANIFEST


def test_the_manifest_alone_is_fetched_first(pushed):
    repository = Repository.at("me/merged")
    assert pushed.fetched() == [MANIFEST]
    assert repository.manifest.expert_names == ("math", "code", "chat")
    assert repository.commit == pushed.repositories["me/merged"].branches["main"]


def test_files_are_fetched_when_they_are_asked_for_and_once(pushed):
    repository = Repository.at("me/merged")
    repository.fetch(["mediator/experts/math.safetensors"])
    repository.fetch(["mediator/experts/math.safetensors"])
    assert pushed.fetched() == [MANIFEST, "mediator/experts/math.safetensors"]


def test_an_altered_file_is_named_when_it_comes(pushed):
    hub = pushed.repositories["me/merged"]
    name = "mediator/experts/math.safetensors"
    content = bytearray(hub.files()[name])
    content[-1] ^= 1
    hub.commit({**hub.files(), name: bytes(content)})
    with pytest.raises(ArtifactError, match=rf"{name}: SHA-256 \w+… required"):
        Repository.at("me/merged").fetch([name])


def test_nothing_that_an_invalid_manifest_names_is_fetched(pushed):
    hub = pushed.repositories["me/merged"]
    text = hub.files()[MANIFEST].replace(b'"config.json"', b'"../config.json"')
    hub.commit({**hub.files(), MANIFEST: text})
    with pytest.raises(ArtifactError, match="is not a path inside the artifact"):
        Repository.at("me/merged")
    assert pushed.fetched() == [MANIFEST]


def test_an_artifact_is_fetched_whole_for_an_engine_and_checked(pushed, artifact):
    root, manifest = fetch_artifact("me/merged")
    assert pushed.fetched()[0] == MANIFEST
    assert all((root / name).is_file() for name in manifest.files)
    assert fetch_artifact(artifact)[0] == artifact
    hub, name = pushed.repositories["me/merged"], "mediator/experts/chat.safetensors"
    hub.commit({**hub.files(), name: hub.files()[name][:-1] + b"?"})
    with pytest.raises(ArtifactError, match=rf"{name}: SHA-256"):
        fetch_artifact("me/merged")


def test_config_fetches_the_manifest_alone(pushed):
    result = call("config", "vllm", "me/merged")
    assert "vllm serve me/merged --enable-lora --max-loras 5" in result.output
    assert pushed.fetched() == [MANIFEST]


def test_a_pinned_revision_stays_when_the_branch_goes_on(pushed):
    hub = pushed.repositories["me/merged"]
    pinned = hub.branches["main"]
    hub.commit({MANIFEST: b"{}"})
    assert Repository.at("me/merged", pinned).manifest.expert_names == ("math", "code", "chat")


def test_what_was_fetched_is_there_without_the_hub(pushed, monkeypatch):
    Repository.at("me/merged").fetch(["config.json"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = Repository.at("me/merged")
    repository.fetch(["config.json"])
    with pytest.raises(
        ShareError, match=r"me/merged@\w+: mediator/experts/math.safetensors: is not in"
    ):
        repository.fetch(["mediator/experts/math.safetensors"])


@pytest.mark.parametrize(
    ("name", "revision", "text"),
    [
        (
            "me/none",
            None,
            "me/none: there is no such directory and no such repository, or it is private",
        ),
        ("me/merged", "v9", "me/merged@v9: there is no such branch, tag or commit"),
        ("OTU", None, "OTU: neither a directory nor a repository: USER/NAME required"),
    ],
)
def test_what_is_not_there_is_named_in_one_line(pushed, name, revision, text):
    with pytest.raises(ShareError, match=text):
        Repository.at(name, revision)


def test_a_repository_without_a_manifest_is_named(pushed):
    pushed.repositories["me/merged"].commit({"config.json": b"{}"})
    with pytest.raises(ArtifactError, match="is not a mediator artifact"):
        Repository.at("me/merged")


def test_a_gated_repository_says_where_to_ask(pushed, monkeypatch):
    pushed.repositories["me/merged"].gated = True
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    with pytest.raises(ShareError, match="me/merged: access is restricted: ask for it on"):
        Repository.at("me/merged")


def test_inspect_reads_manifest_and_headers_of_a_repository(pushed, artifact):
    local, remote = figures("inspect", artifact), figures("inspect", "me/merged")
    local["base"] = "base"  # directories are named there by their last component
    for expert in local["experts"]:
        expert["source"] = expert["name"]
    for totals in (local, remote):  # the configuration is shorter there
        del totals["total_bytes"], totals["total_over_dense"]
    assert remote == local
    assert "model.safetensors" not in pushed.fetched()


def test_verify_compares_digests_without_a_download(pushed):
    assert call("verify", "me/merged").exit_code == 0
    assert not [name for name in pushed.fetched() if name.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model.safetensors": b"other"}, "me/merged: model.safetensors: SHA-256"),
        ({"config.json": b"{}"}, "config.json: .* bytes required, got 2"),
        (
            {"adapter_config.json": b"x"},
            "me/merged: adapter_config.json: the manifest does not name it",
        ),
    ],
)
def test_verify_names_an_altered_file_of_a_repository(pushed, change, text):
    hub = pushed.repositories["me/merged"]
    hub.commit({**hub.files(), **change})
    result = call("verify", "me/merged")
    assert result.exit_code == 1
    assert re.search(text, result.stderr), result.stderr


def test_an_experts_file_is_fetched_when_a_mixture_first_needs_it(pushed, artifact):
    remote = MediatorModel.from_pretrained("me/merged")
    assert not experts_fetched(pushed)
    assert remote.experts == ("math", "code", "chat")
    local, ids = MediatorModel.from_pretrained(artifact), torch.tensor([[4, 5, 6]])
    for mixture in ("dense", "code", {"math": 0.5, "code": 0.5}):
        logits = [m.forward(ids, mixture=mixture).logits for m in (local, remote)]
        assert torch.equal(*logits)
    assert experts_fetched(pushed) == ["code", "math"]


def test_named_experts_are_fetched_at_once(pushed):
    MediatorModel.from_pretrained("me/merged", experts=["chat"])
    assert experts_fetched(pushed) == ["chat"]
    with pytest.raises(MixtureError, match="unknown expert 'law'; this model has math, code, chat"):
        MediatorModel.from_pretrained("me/merged", experts=["law"])


def fetched_for_code(hub, family, out, **parameters):
    """The experts whose files come when `code` of a pushed merge answers, as it does from the directory."""
    build(out, family, **parameters)
    push(prepare(out), "me/pushed")
    hub.requests.clear()
    remote, local = map(MediatorModel.from_pretrained, ("me/pushed", out))
    ids = torch.tensor([[4, 5, 6]])
    logits = [m.forward(ids, mixture="code").logits for m in (local, remote)]
    assert torch.equal(*logits)
    return sorted(experts_fetched(hub))


def test_where_the_dense_expert_holds_shares_of_all_a_mixture_fetches_all(hub, family, tmp_path):
    assert fetched_for_code(hub, family, tmp_path / "shares", bits=2.0) == ["chat", "code", "math"]


def test_an_expert_of_random_signs_needs_no_file_of_another(hub, family, tmp_path):
    signs = {"values": "random_sign", "bits": 2.0}
    assert fetched_for_code(hub, family, tmp_path / "signs", **signs) == ["code"]


def test_a_file_that_comes_altered_is_refused_and_the_next_request_works(pushed):
    hub, name = pushed.repositories["me/merged"], "mediator/experts/math.safetensors"
    hub.commit({**hub.files(), name: hub.files()[name][:-1] + b"?"})
    model, ids = MediatorModel.from_pretrained("me/merged"), torch.tensor([[4, 5, 6]])
    with pytest.raises(ArtifactError, match=rf"{name}: SHA-256"):
        model.forward(ids, mixture="math")
    assert model.forward(ids, mixture="code").logits.isfinite().all()


def test_a_repository_that_was_used_answers_without_the_hub(pushed, monkeypatch):
    ids = torch.tensor([[4, 5, 6]])
    MediatorModel.from_pretrained("me/merged", experts=["math"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = MediatorModel.from_pretrained("me/merged")
    assert model.forward(ids, mixture="math").logits.isfinite().all()
    with pytest.raises(ShareError, match=r"experts/code.safetensors: is not in the cache"):
        model.forward(ids, mixture="code")
    pushed.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    model = MediatorModel.from_pretrained("me/merged", local_files_only=True)
    assert model.forward(ids, mixture="math").logits.isfinite().all()
    assert not pushed.requests


def test_a_private_repository_is_read_with_the_token_that_is_given(pushed, monkeypatch):
    pushed.repositories["me/merged"].private = True
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ShareError, match="or it is private"):
        MediatorModel.from_pretrained("me/merged", token=False)
    assert MediatorModel.from_pretrained("me/merged", token=fake_hub.READER).experts


def test_the_stock_class_with_remote_code_fetches_what_it_needs(pushed):
    model = AutoModelForCausalLM.from_pretrained("me/merged", trust_remote_code=True)
    ids = torch.tensor([[4, 5, 6]])
    model.generate(ids, max_new_tokens=2, do_sample=False)
    assert experts_fetched(pushed)


def experts_fetched(hub):
    """The experts whose files were downloaded, in order."""
    matches = [re.fullmatch(r"mediator/experts/(\w+)\.safetensors", name) for name in hub.fetched()]
    return [match[1] for match in matches if match]
