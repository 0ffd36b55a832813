import re

import pytest
from commands import call, figures

from mergekit_mediator.errors import ArtifactError, ShareError
from mergekit_mediator.share.pull import Repository
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
    with pytest.raises((ArtifactError, ShareError), match=r"tokenizer|generation|cache|missing"):
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
            "me/merged: adapter_config.json: not named by the manifest",
        ),
    ],
)
def test_verify_names_an_altered_file_of_a_repository(pushed, change, text):
    hub = pushed.repositories["me/merged"]
    hub.commit({**hub.files(), **change})
    result = call("verify", "me/merged")
    assert result.exit_code == 1
    assert re.search(text, result.stderr), result.stderr
