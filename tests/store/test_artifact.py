import json
import shutil
from pathlib import Path

import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM

from mergekit_mediator import MediatorModel
from mergekit_mediator.errors import ArtifactError, OutputError
from mergekit_mediator.merge.run import run
from mergekit_mediator.store import durable
from mergekit_mediator.store import manifest as artifact
from mergekit_mediator.store.digests import digest
from mergekit_mediator.store.expert_file import ExpertWriter
from mergekit_mediator.store.manifest import MANIFEST, read_manifest
from mergekit_mediator.store.verification import verify_base, verify_files


@pytest.fixture(scope="module")
def original(family, tmp_path_factory):
    out = tmp_path_factory.mktemp("artifact") / "out"
    merge(family, out)
    return out


@pytest.fixture
def out(original, tmp_path):
    """A copy of an artifact, free to be damaged."""
    return shutil.copytree(original, tmp_path / "copy")


def merge(family, out, **keywords):
    config = MergeConfiguration.model_validate(family.config(routed_layers="1", density=0.5))
    return run(config, str(out), MergeOptions(quiet=True), **keywords)


def edit(out, change):
    manifest = json.loads((out / MANIFEST).read_text())
    change(manifest)
    (out / MANIFEST).write_text(json.dumps(manifest))


def listing(directory):
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}


def test_the_output_has_checkpoint_manifest_experts_and_card(original):
    assert listing(original) >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
        "mergekit_config.yml",
        "mediator/manifest.json",
        "mediator/experts/math.safetensors",
        "mediator/experts/code.safetensors",
        "mediator/experts/chat.safetensors",
    }


def test_the_manifest_vouches_for_every_other_file_but_the_card_which_people_edit(original):
    files = read_manifest(original).files
    assert set(files) == listing(original) - {MANIFEST, "README.md"}
    for name, expected in files.items():
        assert digest(original / name) == expected


def test_the_manifest_describes_base_experts_layers_and_parameters(original, family):
    manifest = read_manifest(original)
    assert manifest.format_version == 1
    assert manifest.base.source == str(family.base)
    assert set(manifest.base.files) == {"model.safetensors"}
    assert [e.source for e in manifest.experts] == [str(p) for p in family.experts.values()]
    assert [layer.name for layer in manifest.layers if layer.routed] == ["1"]
    assert manifest.parameters["density"] == 0.5
    assert manifest.parameters["routed_layers"] == "1"
    assert manifest.parameters["values"] == "exact"
    assert "route" not in manifest.parameters


def test_an_artifact_as_written_verifies(original, family):
    verify_files(original, read_manifest(original))
    verify_base(family.base, read_manifest(original))


def test_a_flipped_bit_anywhere_is_refused_by_name(original, tmp_path):
    for index, name in enumerate(read_manifest(original).files):
        out = shutil.copytree(original, tmp_path / str(index))
        content = bytearray((out / name).read_bytes())
        content[len(content) // 2] ^= 1
        (out / name).write_bytes(content)
        with pytest.raises(ArtifactError, match=f"{out / name}: SHA-256"):
            MediatorModel.from_pretrained(out)


def test_a_missing_file_is_refused_by_name(out):
    (out / "mediator/experts/code.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"code\.safetensors: missing"):
        MediatorModel.from_pretrained(out)


def test_a_truncated_file_is_refused_by_name(out):
    with (out / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ArtifactError, match=r"model\.safetensors: \d+ bytes required, got 100"):
        MediatorModel.from_pretrained(out)


def test_a_directory_without_manifest_is_no_artifact_but_still_a_model(out):
    (out / MANIFEST).unlink()
    with pytest.raises(ArtifactError, match=r"manifest\.json: cannot be read"):
        MediatorModel.from_pretrained(out)
    AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=2), "format_version 1 required, got 2"),
        (lambda m: m.pop("experts"), "experts: Field required"),
        (lambda m: m.update(surprise=1), "surprise: Extra inputs"),
        (lambda m: m["files"].update({"../x": m["files"]["config.json"]}), r"'\.\./x' is not a"),
        (lambda m: m["files"].update({"/x": m["files"]["config.json"]}), "'/x' is not a path"),
        (lambda m: m["files"].update({"a/../../x": m["files"]["config.json"]}), "is not a path"),
        (lambda m: m["files"].update({"a\\..\\x": m["files"]["config.json"]}), "is not a path"),
        (lambda m: m["experts"][0].update(file="../../x.safetensors"), "must be experts/math"),
        (lambda m: m["experts"][0].update(name="../x"), "experts.0.name"),
        (lambda m: m["experts"][1].update(m["experts"][0]), "two experts have the same name"),
        (lambda m: m["files"]["config.json"].update(bytes=-1), "files.config.json.bytes"),
        (lambda m: m["files"]["config.json"].update(sha256="x"), "files.config.json.sha256"),
        (
            lambda m: m["files"].pop("mediator/experts/chat.safetensors"),
            "a digest of experts/chat\\.safetensors required",
        ),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(out, change, message):
    edit(out, change)
    with pytest.raises(ArtifactError, match=message) as caught:
        MediatorModel.from_pretrained(out)
    assert "manifest.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\0", "null"])
def test_a_manifest_that_is_no_json_object_is_refused(out, text):
    (out / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json: "):
        read_manifest(out)


def test_the_file_of_another_expert_is_refused(out):
    experts = out / artifact.EXPERTS
    shutil.copy(experts / "math.safetensors", experts / "code.safetensors")
    with pytest.raises(ArtifactError, match=r"code\.safetensors: holds expert 'math', not 'code'"):
        MediatorModel.from_pretrained(out, verify=False)


def test_another_base_is_refused_by_name(original, family, tmp_path):
    base = shutil.copytree(family.base, tmp_path / "base")
    shutil.copy(family.experts["math"] / "model.safetensors", base / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"base/model\.safetensors: SHA-256 .* required, got"):
        verify_base(base, read_manifest(original))
    (base / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"base/model\.safetensors: missing"):
        verify_base(base, read_manifest(original))


def test_an_output_that_holds_a_model_is_left_alone(family, out):
    before = {name: digest(out / name) for name in listing(out)}
    with pytest.raises(OutputError, match=r"holds a model .*--overwrite"):
        merge(family, out)
    assert {name: digest(out / name) for name in listing(out)} == before


def test_overwrite_replaces_the_model_and_keeps_other_files(family, out):
    (out / "notes.txt").write_text("mine")
    (out / "mediator/experts/old.safetensors").write_bytes(b"")
    (out / "model-00001-of-00002.safetensors").write_bytes(b"")
    merge(family, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert set(read_manifest(out).files) == listing(out) - {MANIFEST, "README.md", "notes.txt"}
    MediatorModel.from_pretrained(out)


def test_an_output_directory_may_exist_already(family, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    merge(family, tmp_path / "out")
    assert (tmp_path / "out/notes.txt").read_text() == "mine"


def test_an_output_that_is_a_file_is_refused(family, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="out: is a file"):
        merge(family, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("place", ["append", "close"])
def test_an_interrupt_while_writing_leaves_nothing(family, tmp_path, monkeypatch, place):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ExpertWriter, place, interrupt)
    with pytest.raises(KeyboardInterrupt):
        merge(family, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_while_publishing_leaves_the_earlier_model(family, out, monkeypatch):
    """See test_staging for every other moment, and every other way to publish."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = {name: digest(out / name) for name in listing(out)}
    with monkeypatch.context() as patch:
        patch.setattr(durable, "exchange", interrupt)
        with pytest.raises(KeyboardInterrupt):
            merge(family, out, overwrite=True)
    assert {name: digest(out / name) for name in listing(out)} == before
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    MediatorModel.from_pretrained(out)


def test_a_failed_merge_leaves_the_earlier_model(family, out, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ExpertWriter, "append", interrupt)
    with pytest.raises(KeyboardInterrupt):
        merge(family, out, overwrite=True)
    MediatorModel.from_pretrained(out)


def test_an_edited_card_and_other_additions_are_no_damage(out):
    (out / "README.md").write_text("---\nlicense: mit\n---\n")
    (out / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (out / "runs").mkdir()
    shutil.copy(out / "model.safetensors", out / "runs" / "other.safetensors")
    MediatorModel.from_pretrained(out)


@pytest.mark.parametrize(
    "name", ["model-2.safetensors", "pytorch_model.bin", "mediator/experts/law.safetensors"]
)
def test_weights_that_the_manifest_does_not_name_are_refused(out, name):
    shutil.copy(out / "model.safetensors", out / name)
    with pytest.raises(ArtifactError, match=f"{name}: the manifest does not name it"):
        MediatorModel.from_pretrained(out)


def test_a_manifest_that_vouches_for_no_expert_is_refused(out):
    edit(out, lambda manifest: manifest.update(files={}))
    with pytest.raises(
        ArtifactError, match=r"digest of experts/math\.safetensors required, expert 'math'"
    ):
        read_manifest(out)


def test_no_folder_is_made_outside_an_existing_output_directory(family, tmp_path, monkeypatch):
    made = []
    mkdir = Path.mkdir

    def note(path, *args, **options):
        made.append(path)
        mkdir(path, *args, **options)

    out = tmp_path / "parent" / "out"
    out.mkdir(parents=True)
    monkeypatch.setattr(Path, "mkdir", note)
    merge(family, out)
    folders = [path for path in made if path.is_relative_to(tmp_path)]
    assert folders
    assert all(path.is_relative_to(out) for path in folders)
    assert not list(out.glob(".*"))


def test_the_directory_of_the_shell_may_be_the_output(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    merge(family, ".")
    assert read_manifest(tmp_path).expert_names == ("math", "code", "chat")
    assert f"\n# {tmp_path.name}\n" in (tmp_path / "README.md").read_text()


def test_an_output_without_a_name_is_refused(family):
    with pytest.raises(OutputError, match="the name of the output directory is empty: give a name"):
        merge(family, "")


def test_an_output_below_a_file_is_refused_by_its_own_name(family, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=f"^{tmp_path}/file/out: cannot be written"):
        merge(family, tmp_path / "file" / "out")


def test_a_router_of_other_experts_than_the_manifest_has_is_refused(out):
    edit(out, lambda manifest: manifest["experts"].pop())
    model = MediatorModel.from_pretrained(out)
    with pytest.raises(
        ArtifactError, match=r"response.safetensors: routes to math, code, chat, and"
    ):
        model.route(torch.tensor([[1, 2, 3]]))
