import json

import pytest
import records

from mergekit_mediator.errors import ArtifactError
from mergekit_mediator.store.digests import digest_of
from mergekit_mediator.store.evaluation import (
    Evaluation,
    loaded_digest,
    read_evaluation,
    write_evaluation,
)
from mergekit_mediator.store.manifest import EVALUATION, BaseEntry, Manifest


def manifest(**files):
    return Manifest(
        format_version=1,
        package_version="0",
        base=BaseEntry(source="base", files={}),
        experts=(),
        layers=(),
        parameters={},
        parameter_count=1,
        files={name: digest_of(content) for name, content in files.items()},
    )


FILES = {"model.safetensors": b"1", "mediator/router.safetensors": b"2", "config.json": b"{}"}


@pytest.fixture
def root(tmp_path):
    """A directory with the record of an evaluation of `FILES`."""
    (tmp_path / "mediator").mkdir()
    figures = records.evaluation(artifact=loaded_digest(manifest(**FILES)))
    write_evaluation(tmp_path, Evaluation.model_validate(figures))
    return tmp_path


def test_a_record_is_read_as_it_was_written(root):
    evaluation = read_evaluation(root, manifest(**FILES))
    assert evaluation.systems["mediator"].routing_accuracy == 0.9375
    assert evaluation.systems["mediator"].tasks["code"].accuracy == 0.875
    assert evaluation.reliability == [(4, 0.6, 0.75), (12, 0.97, 1.0)]


def test_without_an_evaluation_there_is_none(tmp_path):
    assert read_evaluation(tmp_path, manifest(**FILES)) is None


@pytest.mark.parametrize("name", FILES)
def test_results_of_other_files_say_nothing_about_this_artifact(root, name):
    assert read_evaluation(root, manifest(**{**FILES, name: b"other"})) is None


def test_card_and_configuration_of_the_merge_may_change(root):
    assert read_evaluation(root, manifest(**FILES, **{"mergekit_config.yml": b"x"})) is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"systems": {"base": {"tasks": {}}}}, "a score of system 'base' on each task"),
        ({"routing": {}}, "and the routing of each task"),
        ({"sources": {}, "systems": {}, "routing": {}}, "and the routing of each task"),
        ({"systems": {}}, "a system, and the routing"),
        ({"reliability": [[1, 2.0, 0.5]]}, "reliability.0.1: Input should be less than or equal"),
        ({"artifact": 3}, "artifact: Input should be a valid string"),
    ],
)
def test_a_damaged_record_is_refused_in_one_line(root, change, message):
    (root / EVALUATION).write_text(json.dumps(records.evaluation(**change)))
    with pytest.raises(ArtifactError) as caught:
        read_evaluation(root, manifest(**FILES))
    assert str(caught.value).startswith(f"{root / EVALUATION}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("run `mergekit-mediator evaluate` again, or remove the file")
