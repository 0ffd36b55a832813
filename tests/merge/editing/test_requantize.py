import itertools
import json
import subprocess
import sys

import edits
import pytest
import torch
from commands import call

from mergekit_mediator.errors import ConfigError, EditError
from mergekit_mediator.merge.editing.remove import remove_expert
from mergekit_mediator.merge.editing.requantize import requantize
from mergekit_mediator.models.loading import DenseCheckpoint
from mergekit_mediator.store.manifest import read_manifest


def error(before, after):
    """The root of the squared error over the squared norm."""
    lost = sum(float((after.get(w, 0) - x).square().sum()) for w, x in before.items())
    return (lost / sum(float(x.square().sum()) for x in before.values())) ** 0.5


@pytest.mark.parametrize("form", ["bits", "averaged", "base"])
def test_fewer_bits_take_fewer_bytes_and_the_error_is_told(fresh, artifacts, form):
    before, out = read_manifest(artifacts(form)), fresh(form)
    edited = requantize(out, bits=2.5, experts=["code"])
    manifest = edits.check(out, edits.NAMES)
    edits.same_files(before, manifest, "mediator/experts/code.safetensors")
    (change,) = edited.changes
    file = "mediator/experts/code.safetensors"
    assert change.details["after"] == manifest.files[file].bytes < before.files[file].bytes
    lost = error(edits.changes(artifacts(form), "code"), edits.changes(out, "code"))
    assert change.details["error"] == pytest.approx(lost, rel=1e-4)
    assert 0.01 < lost < 0.8
    assert manifest.history == (change,)


def test_lower_rates_lose_more(artifacts, tmp_path):
    lost = []
    for bits in (3, 2, 1.2):
        out = edits.copied(artifacts("base"), tmp_path / f"{bits}")
        edited = requantize(out, bits=bits)
        lost.append([change.details["error"] for change in edited.changes])
        assert [change.expert for change in edited.changes] == list(edits.NAMES)
    for finer, coarser in itertools.pairwise(lost):
        assert all(a < b for a, b in zip(finer, coarser, strict=True))


@pytest.mark.parametrize("form", ["bits", "base"])
def test_a_requantized_expert_is_served_as_it_is_stored(artifacts, fresh, form):
    out = fresh(form)
    requantize(out, bits=2)
    stored, want = {n: edits.changes(out, n) for n in edits.NAMES}, {}
    dense = DenseCheckpoint(out)
    share = 0 if form == "base" else 1 / 3
    for weight in dense.shapes:
        value = dense.weight(weight).float()
        for name in edits.NAMES:
            value = value + ((name == "math") - share) * stored[name].get(weight, 0)
        want[weight] = value
    for name, weight in edits.served(out, "math").items():
        assert torch.allclose(weight.float(), want[name], rtol=2**-7, atol=2**-9), name


@pytest.mark.parametrize("values", ["int8", "int4", "sign"])
def test_exact_values_become_a_smaller_form_at_the_same_places(fresh, artifacts, values):
    out = fresh("density")
    edited = requantize(out, values=values)
    manifest = edits.check(out, edits.NAMES)
    before, after = edits.changes(artifacts("density"), "chat"), edits.changes(out, "chat")
    bound = {"int8": 0.02, "int4": 0.3, "sign": 0.9}[values]
    assert 0 < edited.changes[2].details["error"] < bound
    for weight, change in after.items():
        assert not bool((change != 0)[before[weight] == 0].any()), weight
    files = [f"mediator/experts/{name}.safetensors" for name in edits.NAMES]
    edits.same_files(read_manifest(artifacts("density")), manifest, *files)
    if values == "int4":
        requantize(out, values="sign")
        with pytest.raises(EditError, match="has sign values: a smaller form than that required"):
            requantize(out, values="int8")


def test_the_rate_of_the_slope_is_kept_for_the_expert(fresh):
    out = fresh("bits")
    slopes = read_manifest(out).parameters["slopes"]
    after = requantize(out, bits=2, experts=["math"]).manifest.parameters["slopes"]
    assert after["math"] > slopes["math"]
    assert {**after, "math": 0} == {**slopes, "math": 0}


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("bits", {"bits": 8}, r"'math': --bits above 0 and below [\d.]+ required, .* got 8: lower"),
        ("bits", {"bits": 0}, r"--bits above 0"),
        ("bits", {"bits": float("nan")}, r"--bits above 0"),
        ("bits", {"values": "int8"}, "low rank plus sparse, which has no `values`: give --bits"),
        ("density", {"bits": 2}, "is stored relative to the dense expert, .* give --values"),
        ("density", {"values": "int8", "experts": ["law"]}, "has no expert 'law'"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(fresh, form, options, message):
    out = fresh(form)
    before = read_manifest(out)
    with pytest.raises(EditError, match=message):
        requantize(out, **options)
    assert edits.check(out, edits.NAMES) == before


def test_fewer_bits_than_the_smallest_form_are_refused(fresh):
    with pytest.raises(ConfigError, match=r"bits: at least [\d.]+ required"):
        requantize(fresh("bits"), bits=0.001)


def test_the_command_needs_one_form(fresh):
    out = fresh("bits")
    assert "give either --bits or --values" in call("requantize", out).output
    result = call("requantize", out, "--bits", 2, "--expert", "chat")
    assert result.exit_code == 0, result.output
    assert "% (root mean square) from what was stored" in result.output


def test_an_expert_leaves_after_it_was_requantized(fresh):
    out = fresh("bits")
    requantize(out, bits=2)
    want = edits.served(out, "chat")
    remove_expert(out, "code")
    for name, weight in edits.served(out, "chat").items():
        assert torch.allclose(weight, want[name], rtol=2**-6, atol=2**-9), name


def test_no_change_of_stored_experts_needs_mergekit(fresh):
    script = (
        "import json, sys; sys.modules['mergekit'] = None\n"
        "from mergekit_mediator.cli.main import main\n"
        "main(json.loads(sys.argv[1]))"
    )
    out = str(fresh("bits"))
    for arguments in (["requantize", out, "--bits", "2"], ["remove-expert", out, "code"]):
        command = [sys.executable, "-c", script, json.dumps(arguments)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
