import shutil

import edits
import pytest
import torch
from commands import call, figures

from mergekit_mediator.errors import ArtifactError, EditError
from mergekit_mediator.merge.editing.rename import rename_expert
from mergekit_mediator.route.calibrated import CalibratedRouter
from mergekit_mediator.route.response import ResponseRouter
from mergekit_mediator.store.manifest import RESPONSE, ROUTER, read_manifest


@pytest.mark.parametrize("form", edits.FORMS)
def test_a_renamed_expert_answers_as_before_under_its_new_name(fresh, artifacts, form):
    before, out = artifacts(form), fresh(form)
    rename_expert(out, "code", "c-plus.2")
    manifest = edits.check(out, ("math", "c-plus.2", "chat"))
    old = read_manifest(before)
    edits.same_files(old, manifest, "mediator/experts/code.safetensors", RESPONSE)
    want = edits.served(before, {"code": 0.3, "chat": 0.7})
    got = edits.served(out, {"c-plus.2": 0.3, "chat": 0.7})
    assert all(torch.equal(got[name], weight) for name, weight in want.items())
    if "slopes" in old.parameters:
        assert set(manifest.parameters["slopes"]) == {"math", "c-plus.2", "chat"}


def test_the_routers_keep_every_decision(fresh, tmp_path):
    out = edits.calibrate(fresh("density"), edits.data(tmp_path))
    before = read_manifest(out)
    calibrated, response = CalibratedRouter.load(out / ROUTER), ResponseRouter.load(out / RESPONSE)
    rename_expert(out, "math", "algebra")
    manifest, names = edits.check(out, ("algebra", "code", "chat")), ("algebra", "code", "chat")
    after = CalibratedRouter.load(out / ROUTER, names)
    rows = calibrated.features["code"]
    assert torch.equal(after.decide(rows).weights, calibrated.decide(rows).weights)
    for weight, directions in ResponseRouter.load(out / RESPONSE, names).directions.items():
        assert torch.allclose(directions, response.directions[weight], rtol=1e-2, atol=1e-4)
    assert manifest.router["accuracy"] == before.router["accuracy"]
    assert manifest.router["experts"] == list(names)
    assert set(manifest.router["data"]) == set(manifest.router["prompts"]) == set(names)
    assert "stale" not in manifest.router


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("law", "tax", "has no expert 'law': name one of math, code, chat"),
        ("math", "code", "expert name 'code': another expert has it"),
        ("math", "math", "expert name 'math': the expert has it already"),
        ("math", "Math", "expert name 'Math': 1 to 64 characters of a-z"),
        ("math", "../x", "the first a letter or digit"),
        ("math", "", "the first a letter or digit"),
    ],
)
def test_names_that_cannot_be_are_refused_and_nothing_changes(fresh, old, new, message):
    out = fresh("density")
    before = read_manifest(out)
    with pytest.raises(EditError, match=message):
        rename_expert(out, old, new)
    assert edits.check(out, edits.NAMES) == before
    assert not list(out.parent.glob(".*"))


def test_an_artifact_that_does_not_verify_is_refused(fresh):
    out = fresh("density")
    with (out / "mediator/experts/chat.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ArtifactError, match=r"chat.safetensors: \d+ bytes required"):
        rename_expert(out, "math", "algebra")
    assert read_manifest(out).expert_names == edits.NAMES


def test_a_directory_without_an_artifact_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    result = call("rename-expert", tmp_path / "empty", "a", "b")
    assert result.exit_code == 1
    assert "is not a mediator artifact" in result.output


def test_inspect_and_the_card_show_the_history(fresh):
    out = fresh("density")
    result = call("rename-expert", out, "math", "algebra")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[0] == "expert math was renamed to algebra"
    call("rename-expert", out, "algebra", "math")
    assert [c["action"] for c in figures("inspect", out)["history"]] == ["rename", "rename"]
    assert "- expert algebra was renamed to math" in call("inspect", out).output
    card = (out / "README.md").read_text()
    assert "## Changes since the merge\n\n- expert math was renamed to algebra\n" in card


def test_what_people_wrote_in_the_card_stays(fresh):
    out = fresh("density")
    path = out / "README.md"
    path.write_text(path.read_text() + "\nEdited.\n")
    result = call("rename-expert", out, "math", "algebra")
    text = path.read_text()
    assert text.endswith("\nEdited.\n")
    assert "- expert math was renamed to algebra\n" in text
    assert "README.md was edited after the merge: describe the change" in result.output
    path.write_text(text.replace("- expert math was renamed to algebra\n", "- my own words\n"))
    mine = path.read_text()
    call("rename-expert", out, "algebra", "math")
    assert path.read_text() == mine


def test_files_of_the_user_stay(fresh):
    out = fresh("density")
    (out / "notes.txt").write_text("mine")
    rename_expert(out, "math", "algebra")
    assert (out / "notes.txt").read_text() == "mine"
    shutil.rmtree(out / "mediator/experts")
    with pytest.raises(ArtifactError, match="missing, but the manifest names it"):
        rename_expert(out, "algebra", "math")
