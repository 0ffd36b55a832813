import json
import time

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from mergekit_mediator.merge import model_cards as licenses
from mergekit_mediator.merge.model_cards import license_of


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: apache-2.0\n---\n# Math\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: llama3\n---\n", "llama3"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\ntags: [math]\n---\n", None),
        ("# Math\n", None),
        ("", None),
    ],
)
def test_a_licence_is_what_the_card_states(tmp_path, card, license):
    (tmp_path / "README.md").write_text(card)
    assert license_of(str(tmp_path)) == license


def test_a_model_without_a_card_states_none(tmp_path):
    assert license_of(str(tmp_path)) is None


@pytest.mark.parametrize("card", ["---\nlicense: [\n---\n", "---\n- mit\n---\n"])
def test_a_card_that_cannot_be_read_is_warned_of(tmp_path, capsys, card):
    (tmp_path / "README.md").write_text(card)
    assert license_of(str(tmp_path)) is None
    assert f"warning: {tmp_path}: the model card cannot be read: " in capsys.readouterr().out


def test_the_card_of_a_model_on_the_hub_is_that_of_its_revision(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    asked = []

    def download(repo, name, revision, local_files_only):
        asked.append((repo, name, revision))
        return str(tmp_path / name)

    monkeypatch.setattr(licenses, "hf_hub_download", download)
    assert license_of("org/math", "v1") == "mit"
    assert asked == [("org/math", "README.md", "v1")]


def test_a_hub_that_cannot_be_reached_does_not_stop_a_merge(monkeypatch):
    def unreachable(*_, **__):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(licenses, "hf_hub_download", unreachable)
    assert license_of("org/math") is None


def test_a_hub_that_cannot_be_reached_is_asked_once_and_fast(monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    for model in ("org/math", "org/code", "org/chat"):
        assert license_of(model) is None
    assert time.monotonic() - began < 5
    assert capsys.readouterr().out.count("the Hub does not answer") == 1


def test_a_merge_notes_the_licence_of_every_model(family, merged):
    (family.base / "README.md").write_text("---\nlicense: mit\n---\n")
    (family.experts["math"] / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    out = merged(family.config())
    manifest = json.loads((out / "mediator" / "manifest.json").read_text())
    assert manifest["base"]["license"] == "mit"
    stated = {expert["name"]: expert["license"] for expert in manifest["experts"]}
    assert stated == {"math": "apache-2.0", "code": None, "chat": None}
    assert "| apache-2.0 |" in (out / "README.md").read_text()
