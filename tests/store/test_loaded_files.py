"""Every file that loading may read is named by the manifest, or the artifact is refused."""

import ast
import re
import shutil
from pathlib import Path

import peft.utils.constants
import pytest
import transformers
import transformers.integrations.mistral.constants
import transformers.utils
import transformers.utils.hub
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_mediator import MediatorModel
from mergekit_mediator.cli.main import main
from mergekit_mediator.errors import ArtifactError
from mergekit_mediator.merge.run import run
from mergekit_mediator.store.loaded_files import is_of_a_model, loaded_files
from mergekit_mediator.store.manifest import read_manifest
from mergekit_mediator.store.verification import verify_files

SOURCES = Path(transformers.__file__).parent
READ_BY_NO_LOADER = {"modelcard.json"}


def merge(family, out, **options):
    config = MergeConfiguration.model_validate(family.config(routed_layers="1", density=0.5))
    run(config, str(out), MergeOptions(quiet=True), **options)
    return out


@pytest.fixture(scope="module")
def original(family, tmp_path_factory):
    return merge(family, tmp_path_factory.mktemp("loaded") / "out")


@pytest.fixture
def out(original, tmp_path):
    """A copy of an artifact, free to be added to."""
    return shutil.copytree(original, tmp_path / "out")


def constants(module):
    """The file names that a module of another package has as constants."""
    names = {k: v for k, v in vars(module).items() if k.isupper() and isinstance(v, str)}
    return {v for k, v in names.items() if re.search("NAME|FILE", k) and re.search(r"\w\.\w+$", v)}


def test_the_constants_of_transformers_and_peft_are_known():
    modules = [
        transformers.utils,
        transformers.utils.hub,
        transformers.integrations.mistral.constants,
    ]
    modules += [transformers.tokenization_utils_base, peft.utils.constants]
    names = set().union(*map(constants, modules))
    assert {"config.json", "model.safetensors", "chat_template.jinja", "tekken.json"} <= names
    assert {"adapter_config.json", "adapter_model.bin", "pytorch_model.bin.index.json"} <= names
    assert {name for name in names if not is_of_a_model(name)} == READ_BY_NO_LOADER


def test_the_vocabularies_of_all_tokenizers_are_known():
    names = set()
    for path in SOURCES.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(
            r"(?i)^ *vocab_files_names\b[^=\n]*= *(\{.*?\})", text, re.M | re.S
        ):
            values = ast.parse(match[1], mode="eval").body.values
            names.update(value.value for value in values if isinstance(value, ast.Constant))
    assert {"vocab.json", "merges.txt", "spiece.model", "vocab.txt", "source.spm"} <= names
    assert [name for name in sorted(names) if not is_of_a_model(name)] == []


def test_the_folders_that_transformers_looks_into_are_known():
    assert is_of_a_model(f"{transformers.utils.hub.CHAT_TEMPLATE_DIR}/tools.jinja")
    text = (SOURCES / "generation" / "utils.py").read_text(encoding="utf-8")
    read = set(re.findall(r'"(custom_generate/[\w./]+)"', text))
    assert read == {"custom_generate/generate.py", "custom_generate/requirements.txt"}
    assert all(map(is_of_a_model, read))


def test_every_file_of_an_artifact_that_loading_reads_is_named(original):
    assert set(loaded_files(original)) <= set(read_manifest(original).files)
    for name in ("config.json", "tokenizer.json", "modeling_mediator.py", "model.safetensors"):
        assert name in set(loaded_files(original))


PLANTED = [
    "chat_template.json",
    "additional_chat_templates/tools.jinja",
    "chat_templates/tools.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "any.model",
    "tokenizer.5.0.0.json",
    "tekken.json",
    "qwen.tiktoken",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "config.5.0.0.json",
    "preprocessor_config.json",
    "processor_config.json",
    "modeling_other.py",
    "helper.py",
    "custom_generate/helper.py",
    "custom_generate/requirements.txt",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "Pytorch_Model.BIN",
    "mediator/router.safetensors",
    "mediator/experts/law.safetensors",
]


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_file_is_refused_by_name_with_what_to_do(out, name):
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("{}")
    message = f"{out / name}: the manifest does not name it, but loading would read it: remove it"
    with pytest.raises(ArtifactError) as caught:
        MediatorModel.from_pretrained(out)
    assert str(caught.value) == message
    result = CliRunner().invoke(main, ["verify", str(out)])
    assert result.exit_code == 1
    assert result.output == f"Error: {message}\n"


def test_a_planted_chat_template_is_refused(out):
    manifest = read_manifest(out)
    (out / "chat_template.jinja").unlink()
    files = {name: d for name, d in manifest.files.items() if name != "chat_template.jinja"}
    manifest = manifest.model_copy(update={"files": files})
    verify_files(out, manifest)
    (out / "chat_template.jinja").write_text("{{ 'always this' }}")
    with pytest.raises(ArtifactError, match=r"chat_template\.jinja: the manifest does not name it"):
        verify_files(out, manifest)


def test_planted_files_behind_links_are_refused(out, tmp_path):
    (tmp_path / "tools.jinja").write_text("x")
    (out / "additional_chat_templates").symlink_to(tmp_path)
    with pytest.raises(
        ArtifactError,
        match=r"additional_chat_templates/tools\.jinja: the manifest does not name it",
    ):
        MediatorModel.from_pretrained(out)
    (out / "additional_chat_templates").unlink()
    (out / "chat_template.json").symlink_to(tmp_path / "tools.jinja")
    with pytest.raises(ArtifactError, match=r"chat_template\.json: the manifest does not name it"):
        MediatorModel.from_pretrained(out)


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "README.md",
        "LICENSE",
        "picture.png",
        "results.json",
        "config.yml",
        "model.gguf",
        ".gitattributes",
        ".git/config.json",
        ".cache/huggingface/download/config.json",
        "runs/model.safetensors",
        "checkpoints/tokenizer.json",
        "scripts/train.py",
        "mediator/notes.md",
        "custom_generate/README.md",
    ],
)
def test_other_files_of_a_user_are_no_damage(out, name):
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("mine")
    MediatorModel.from_pretrained(out)


def test_overwriting_leaves_nothing_of_the_old_model_that_would_be_loaded(family, out):
    """An adapter's configuration made the artifact unloadable; a chat template spoke in every prompt."""
    for name in ("adapter_config.json", "chat_template.json", "additional_chat_templates/a.jinja"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text('{"chat_template": "old"}')
    merge(family, out, overwrite=True)
    MediatorModel.from_pretrained(out)
    assert sorted(loaded_files(out)) == sorted(
        set(read_manifest(out).files) & set(loaded_files(out))
    )
    assert not (out / "additional_chat_templates").exists()
