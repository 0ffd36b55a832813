"""A model that was loaded as its stock class is routed by files whose digests are right, and by no others."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, pipeline

from mergekit_mediator import MediatorModel, remote
from mergekit_mediator.errors import ArtifactError
from mergekit_mediator.route.calibrate import calibrate_artifact
from mergekit_mediator.share import pull
from mergekit_mediator.store.manifest import RESPONSE, ROUTER

GREEDY = {"max_new_tokens": 4, "do_sample": False}
IDS = torch.tensor([[7, 45, 9, 13]])


@pytest.fixture(scope="module")
def original(make, tmp_path_factory):
    """An artifact with both routers."""
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_mediator.merge.run import run

    root = tmp_path_factory.mktemp("attach")
    config = make(dtype=torch.float32).config(route="all", density=0.5)
    run(MergeConfiguration.model_validate(config), str(root / "out"), MergeOptions(quiet=True))
    (root / "prompts.jsonl").write_text('{"prompt": "w1 w2"}\n' * 6)
    model = MediatorModel.from_pretrained(root / "out")
    files = dict.fromkeys(model.experts, root / "prompts.jsonl")
    calibrate_artifact(root / "out", model.model, model.tokenizer, files, kind="embedding")
    return root / "out"


@pytest.fixture
def out(original, tmp_path):
    return shutil.copytree(original, tmp_path / "out")


def attach(out, **options):
    return MediatorModel.attach(AutoModelForCausalLM.from_pretrained(out), out, **options)


def generate_with_custom_code(out, **options):
    model = AutoModelForCausalLM.from_pretrained(out)
    trusted = {"custom_generate": str(out), "trust_remote_code": True}
    return model.generate(IDS, **trusted, **options, **GREEDY)


def stock_class_with_trusted_code(out, **options):
    """As `transformers serve` loads it: by the name of the class."""
    model = LlamaForCausalLM.from_pretrained(out, trust_remote_code=True)
    return model.generate(IDS, **options, **GREEDY)


def call_remote_generate(out, **options):
    return remote.generate(AutoModelForCausalLM.from_pretrained(out), IDS, **options, **GREEDY)


def load_remote_class(out, **options):
    return AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, **options)


WAYS = [
    attach,
    generate_with_custom_code,
    stock_class_with_trusted_code,
    call_remote_generate,
    load_remote_class,
    MediatorModel.from_pretrained,
]


def change_weight(path):
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, path, metadata={"format": "pt"})


def change_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


TAMPERED = {
    "mediator/experts/math.safetensors": change_last_byte,
    ROUTER: change_last_byte,
    RESPONSE: change_last_byte,
    "model.safetensors": change_weight,
    "chat_template.jinja": lambda path: path.write_text(path.read_text().replace("<s>", "</s>", 1)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_file_is_refused_by_name(out, name, way):
    TAMPERED[name](out / name)
    with pytest.raises(ArtifactError, match=f"^{out / name}: ") as caught:
        way(out)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("way", WAYS)
def test_weights_that_the_manifest_does_not_name_are_refused(out, way):
    shutil.copy(out / "model.safetensors", out / "mediator/experts/law.safetensors")
    with pytest.raises(ArtifactError, match=r"law\.safetensors: the manifest does not name it"):
        way(out)


@pytest.mark.parametrize("way", WAYS)
def test_who_trusts_the_files_may_leave_digests_out(out, way):
    (out / "mergekit_config.yml").write_text("changed")
    with pytest.raises(ArtifactError, match=r"mergekit_config\.yml: "):
        way(out)
    way(out, verify=False)


@pytest.mark.parametrize(
    "load",
    [
        lambda out: LlamaForCausalLM.from_pretrained(out, trust_remote_code=True),
        lambda out: pipeline("text-generation", model=str(out), trust_remote_code=True).model,
    ],
)
def test_digests_are_checked_once_not_at_every_call(out, monkeypatch, load):
    checked = []
    stock = pull.verify_files
    monkeypatch.setattr(pull, "verify_files", lambda *given: checked.append(given) or stock(*given))
    model = load(out)
    for _ in range(3):
        model.generate(IDS, **GREEDY)
    assert len(checked) == 1


def test_an_attached_model_answers_as_one_that_was_loaded(out):
    loaded, attached = MediatorModel.from_pretrained(out), attach(out)
    for mixture in ("math", "dense", {"code": 0.5, "chat": 0.5}):
        expected = loaded.generate(IDS, mixture=mixture, **GREEDY)
        assert torch.equal(attached.generate(IDS, mixture=mixture, **GREEDY), expected)
    assert torch.equal(generate_with_custom_code(out), loaded.generate(IDS, **GREEDY))
    assert torch.equal(stock_class_with_trusted_code(out), loaded.generate(IDS, **GREEDY))


@pytest.fixture
def snapshot(out, tmp_path, monkeypatch):
    """The artifact as the Hub's cache holds it: a folder for each revision, of links to blobs."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    for number, path in enumerate(sorted(p for p in out.rglob("*") if p.is_file())):
        link = folder / path.relative_to(out)
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blobs / str(number))
        link.symlink_to(blobs / str(number))
    asked = set()

    def download(repository, revision=None, allow_patterns=()):
        asked.add((repository, revision))
        return str(folder)

    monkeypatch.setattr(pull, "snapshot_download", download)
    return folder, asked


def test_a_snapshot_of_the_hub_is_checked_like_a_directory(snapshot):
    folder, asked = snapshot
    model = AutoModelForCausalLM.from_pretrained(folder)
    MediatorModel.attach(model, "someone/artifact", revision="abc").generate(IDS, **GREEDY)
    assert asked == {("someone/artifact", "abc")}
    expert, router = folder / "mediator/experts/math.safetensors", folder / RESPONSE
    change_last_byte(expert)
    model = MediatorModel.attach(AutoModelForCausalLM.from_pretrained(folder), "someone/artifact")
    with pytest.raises(ArtifactError, match=f"^{expert}: SHA-256"):
        model.generate(IDS, mixture="math", **GREEDY)
    change_last_byte(router)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ArtifactError, match=f"^{router}: SHA-256"):
        MediatorModel.attach(model, "someone/artifact", revision="abc")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.name_or_path = "someone/artifact"
    with pytest.raises(ArtifactError, match=f"^{router}: SHA-256"):
        remote.generate(IDS, model=model, **GREEDY)
