"""An output that is a directory which the merge reads, or is inside one, or around one, is refused before it is read."""

import shutil

import pytest
from faults import contents
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_mediator.errors import OutputError
from mergekit_mediator.merge import run as merge


@pytest.fixture
def models(family, tmp_path, monkeypatch):
    """Copies of a base and two experts, a tokenizer, an adapter and a cache; nothing of them may be read."""
    root = tmp_path / "models"
    for name, path in {"base": family.base, **family.experts, "tokenizer": family.base}.items():
        shutil.copytree(path, root / name)
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_config.json").write_text("{}")
    (root / "cache").mkdir()
    monkeypatch.setattr(merge, "prepared", None)
    return root


def refused(models, out, match, **options):
    config = MergeConfiguration.model_validate(
        {
            "merge_method": "mediator",
            "base_model": str(models / "base"),
            "models": [
                {"model": str(models / "math")},
                {"model": f"{models / 'base'}+{models / 'adapter'}"},
            ],
            "tokenizer": {
                "source": str(models / "tokenizer"),
                "tokens": {"<x>": {"source": str(models / "code")}},
            },
        }
    )
    before = contents(models)
    with pytest.raises(OutputError, match=match) as caught:
        merge.run(config, str(out), MergeOptions(quiet=True, **options), overwrite=True)
    assert "\n" not in str(caught.value)
    assert contents(models) == before


@pytest.mark.parametrize("name", ["base", "math", "adapter", "tokenizer", "code"])
def test_the_directory_of_an_input_is_no_output(models, name, tmp_path):
    message = f"is the directory of {models / name}, which the merge reads: choose another"
    refused(models, models / name, message)
    (tmp_path / "link").symlink_to(models / name)
    refused(models, tmp_path / "link", message)
    refused(models, models / "base" / ".." / name, message)


@pytest.mark.parametrize("name", ["base", "adapter"])
def test_a_directory_inside_that_of_an_input_is_no_output(models, name):
    refused(models, models / name / "a" / "out", f"lies inside the directory of {models / name},")


def test_a_directory_around_that_of_an_input_is_no_output(models):
    refused(models, models, "contains the directory of ")


def test_the_cache_of_merged_adapters_is_no_output(models):
    options = {"lora_merge_cache": str(models / "cache")}
    refused(models, models / "cache", "is the directory of --lora-merge-cache", **options)
    refused(models, models / "cache" / "out", "lies inside the directory of --lora", **options)


def test_the_place_of_a_downloaded_model_is_no_output(family, tmp_path):
    hub = tmp_path / "hub"
    out = hub / "models--org--base" / "snapshots" / "0a"
    config = MergeConfiguration.model_validate({**family.config(), "base_model": "org/base"})
    options = MergeOptions(quiet=True, transformers_cache=str(hub))
    with pytest.raises(OutputError, match="lies inside the directory of org/base, which the merge"):
        merge.run(config, str(out), options)
