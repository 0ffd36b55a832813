"""An artifact on the Hub is changed by a pull, the change and a push."""

import edits
from commands import call
from huggingface_hub import snapshot_download

from mergekit_mediator import MediatorModel
from mergekit_mediator.store.manifest import read_manifest
from mergekit_mediator.store.verification import verify_files


def test_a_pull_a_change_and_a_push_change_the_repository(pushed, artifact, tmp_path):
    out = tmp_path / "out"
    snapshot_download(
        "me/merged", local_dir=out
    )  # what `hf download me/merged --local-dir out` does
    before = read_manifest(out)
    result = call("remove-expert", out, "code")
    assert result.exit_code == 0, result.output
    result = call("push", out, "me/merged")
    assert result.exit_code == 0, result.output
    files = pushed.repositories["me/merged"].files()
    assert "mediator/experts/code.safetensors" not in files
    assert b"## Changes since the merge\n\n- expert code was removed: " in files["README.md"]
    copy = tmp_path / "copy"
    snapshot_download("me/merged", local_dir=copy)
    manifest = read_manifest(copy)
    verify_files(copy, manifest)
    assert manifest.expert_names == ("math", "chat")
    assert [change.action for change in manifest.history] == ["remove"]
    edits.same_files(
        before, manifest, "mediator/experts/code.safetensors", "mediator/response.safetensors"
    )
    assert MediatorModel.from_pretrained("me/merged").experts == ("math", "chat")
    assert "expert code was removed" in call("inspect", "me/merged").output


def test_a_renamed_expert_leaves_no_file_of_its_old_name(pushed, tmp_path):
    out = tmp_path / "out"
    snapshot_download("me/merged", local_dir=out)
    call("rename-expert", out, "code", "programs")
    assert call("push", out, "me/merged").exit_code == 0
    files = {name for name in pushed.repositories["me/merged"].files() if "/experts/" in name}
    assert files == {
        f"mediator/experts/{name}.safetensors" for name in ("math", "programs", "chat")
    }
