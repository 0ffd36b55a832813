"""A calibration that is stopped, or that meets a merge, leaves a valid artifact with the old or the new router."""

import json
import os
import shutil

import pytest
import torch
from click.testing import CliRunner
from faults import contents, faults, in_child, is_leftover

from mergekit_mediator import MediatorModel
from mergekit_mediator.cli.main import main
from mergekit_mediator.errors import ArtifactError, OutputError
from mergekit_mediator.route import calibrate
from mergekit_mediator.store import manifest as artifact
from mergekit_mediator.store.digests import digest
from mergekit_mediator.store.manifest import MANIFEST, ROUTER, read_manifest
from mergekit_mediator.store.output_lock import output_lock
from mergekit_mediator.store.verification import verify_files

NAMES = ("math", "code", "chat")


@pytest.fixture(scope="module")
def merged_once(family, tmp_path_factory):
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_mediator.merge.run import run

    out = tmp_path_factory.mktemp("calibrate") / "out"
    config = MergeConfiguration.model_validate(family.config(route="all", density=0.5))
    run(config, str(out), MergeOptions(quiet=True))
    return out


@pytest.fixture(scope="module")
def model(merged_once):
    return MediatorModel.from_pretrained(merged_once)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """By draw (`first` or `second`) and expert, a file of six prompts."""
    root, files = tmp_path_factory.mktemp("data"), {}
    for draw in ("first", "second"):
        files[draw] = {name: root / f"{draw}-{name}.jsonl" for name in NAMES}
        for i, path in enumerate(files[draw].values()):
            words = [f"w{20 * i + n + (7 if draw == 'second' else 0)}" for n in range(6)]
            path.write_text("".join(json.dumps({"prompt": f"{w} w{i}"}) + "\n" for w in words))
    return files


def fit(out, model, data, **options):
    return calibrate.calibrate_artifact(
        out, model.model, model.tokenizer, data, kind="embedding", **options
    )


@pytest.fixture(params=["first time", "again"])
def out(request, merged_once, model, data, tmp_path):
    """A copy of the artifact, without a router or with a router of the first draw."""
    out = shutil.copytree(merged_once, tmp_path / "work" / "out")
    if request.param == "again":
        fit(out, model, data["first"])
    return out


@pytest.fixture
def states(out, model, data, tmp_path):
    """The router's data and digest before and after a calibration, and the number of its steps on disk."""
    copy = shutil.copytree(out, tmp_path / "copy")
    with faults() as steps:
        fit(copy, model, data["second"])
    return (state(out), state(copy), steps.taken)


def state(out):
    """The data and digest of an artifact's router, after a check that the artifact is valid and routes."""
    manifest = read_manifest(out)
    verify_files(out, manifest)
    model = MediatorModel.from_pretrained(out)
    assert model.route(torch.tensor([[5, 6, 7]])).experts == NAMES
    if manifest.router is None:
        return None
    return manifest.router["data"], manifest.files[manifest.router_file].sha256


def test_a_kill_leaves_a_valid_artifact_and_a_rerun_leaves_nothing_else(
    out, model, data, states, tmp_path
):
    before, after, count = states
    saved = shutil.copytree(out, tmp_path / "saved")
    switched = set()
    for at in range(1, count + 1, 2):

        def killed(at=at):
            with faults(at, "kill"):
                fit(out, model, data["second"])

        assert in_child(killed) == -9
        assert state(out) in (before, after)
        switched.add(state(out) == after)
        fit(out, model, data["second"])
        assert state(out) == after
        assert contents(out).keys() == {*read_manifest(out).files, MANIFEST, "README.md"}
        assert read_manifest(out).router_file == ROUTER
        assert not list(filter(is_leftover, os.listdir(out.parent)))
        shutil.rmtree(out)
        shutil.copytree(saved, out)
    assert switched == {False, True}


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("fault", ["EIO", "ENOSPC", "EROFS"])
def test_a_step_that_fails_ends_in_one_line_and_leaves_a_valid_artifact(
    out, model, data, states, fault, lasting
):
    before, after, count = states
    errors = []
    for at in range(
        4, count, 4
    ):  # the first steps make the lock, which may be in another directory
        message = None
        with faults(at, fault, lasting):
            try:
                fit(out, model, data["second"])
            except (OutputError, ArtifactError) as error:
                message = str(error)
                errors.append(message)
        assert state(out) in ((before, after) if message else (after,))
    assert errors
    assert not any("\n" in message for message in errors)
    fit(out, model, data["second"])
    assert state(out) == after


def test_a_merge_and_a_calibration_keep_each_other_out(out, model, data, monkeypatch):
    before = state(out)
    with output_lock(out), pytest.raises(OutputError, match=r"process \d+ .* writes there: wait"):
        fit(out, model, data["second"])
    assert state(out) == before
    stock = calibrate._store

    def store(*arguments):
        with pytest.raises(OutputError, match=r"writes there"), output_lock(out):
            pass
        stock(*arguments)

    monkeypatch.setattr(calibrate, "_store", store)
    fit(out, model, data["second"])
    assert state(out) != before


def test_an_artifact_that_a_merge_replaced_during_the_calibration_is_not_touched(
    out, model, data, monkeypatch
):
    manifest = read_manifest(out)
    other = manifest.model_copy(update={"parameter_count": 7})
    stock = calibrate.fit_artifact

    def fit_(*arguments):
        artifact.write_manifest(out, other)
        return stock(*arguments)

    monkeypatch.setattr(calibrate, "fit_artifact", fit_)
    with pytest.raises(
        ArtifactError, match="another artifact is there since the calibration began"
    ):
        fit(out, model, data["second"])
    assert read_manifest(out) == other
    verify_files(out, other)


def test_a_model_of_an_artifact_that_a_merge_replaced_is_not_calibrated(out, model, data):
    old = read_manifest(out)
    artifact.write_manifest(out, old.model_copy(update={"parameter_count": 7}))
    with pytest.raises(
        ArtifactError, match="another artifact is there since the calibration began"
    ):
        fit(out, model, data["second"], manifest=old)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "mediator/experts/math.safetensors"]
)
def test_a_flipped_bit_is_refused_by_name(out, model, data, name):
    content = bytearray((out / name).read_bytes())
    content[len(content) // 2] ^= 1
    (out / name).write_bytes(content)
    before = contents(out)
    with pytest.raises(ArtifactError, match=f"{name}: SHA-256 .* altered after the merge"):
        fit(out, model, data["second"])
    result = command(out, data["second"])
    assert result.exit_code == 1
    assert f"{name}: SHA-256" in result.output
    assert contents(out) == before


def command(out, data):
    options = [text for name, path in data.items() for text in ("--data", f"{name}={path}")]
    return CliRunner().invoke(main, ["calibrate", str(out), "--features", "embedding", *options])


@pytest.mark.parametrize("fault", ["EIO", "EROFS"])
def test_the_command_names_a_file_that_it_cannot_write_in_one_line(out, data, fault):
    with faults(4, fault, lasting=True):
        result = command(out, data["second"])
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 1
    (error,) = (line for line in result.output.splitlines() if line.startswith("Error: "))
    assert result.output.endswith(f"{error}\n")
    assert f"{out}: " in error


def test_an_artifact_of_an_earlier_version_loads_and_is_calibrated(out, model, data):
    """The router has the usual name from the start, and still has it afterwards."""
    fit(out, model, data["first"])
    assert read_manifest(out).router_file == ROUTER == "mediator/router.safetensors"
    assert digest(out / ROUTER) == read_manifest(out).files[ROUTER]
    fit(out, model, {"math": data["second"]["math"]})
    assert MediatorModel.from_pretrained(out).manifest.router["prompts"]["code"] == 6


def test_a_router_that_the_manifest_does_not_name_is_not_read(out, model, data, tmp_path):
    other = shutil.copytree(out, tmp_path / "other")
    fit(other, model, data["first"])
    (out / ROUTER).unlink(missing_ok=True)
    manifest = read_manifest(out)
    files = {name: d for name, d in manifest.files.items() if name != ROUTER}
    artifact.write_manifest(out, manifest.model_copy(update={"files": files, "router": None}))
    shutil.copy(other / ROUTER, out / ROUTER)
    with pytest.raises(ArtifactError, match=r"router\.safetensors: the manifest does not name it"):
        MediatorModel.from_pretrained(out)
    model = MediatorModel.from_pretrained(out, verify=False)
    assert model.route(torch.tensor([[5, 6, 7]])).experts == NAMES
    assert model._routers.default == "response"
