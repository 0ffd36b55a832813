import edits
import pytest
import torch
from commands import call

from mergekit_mediator import MediatorModel
from mergekit_mediator.errors import EditError
from mergekit_mediator.merge.editing.remove import remove_expert
from mergekit_mediator.route.calibrated import CalibratedRouter
from mergekit_mediator.store.manifest import RESPONSE, ROUTER, read_manifest


@pytest.mark.parametrize("form", edits.FORMS)
def test_the_others_answer_as_before_and_their_files_stay(fresh, artifacts, form):
    out, before = fresh(form), read_manifest(artifacts(form))
    remove_expert(out, "code")
    manifest = edits.check(out, ("math", "chat"))
    takes_out = form in ("bits", "averaged")
    dense = {name for name in before.files if name.startswith("model")} if takes_out else set()
    edits.same_files(before, manifest, "mediator/experts/code.safetensors", RESPONSE, *dense)
    assert any(manifest.files[n] != before.files[n] for n in dense) == takes_out
    for mixture in ("math", {"math": 0.25, "chat": 0.75}):
        want, got = edits.served(artifacts(form), mixture), edits.served(out, mixture)
        for name, weight in want.items():
            if takes_out:  # the dense weight is rounded once more
                assert torch.allclose(got[name], weight, rtol=2**-6, atol=2**-9), name
            else:
                assert torch.equal(got[name], weight), name


@pytest.mark.parametrize(
    ("form", "stays"),
    [
        ("density", "the average of all 5 layers, the dense expert, still holds it"),
        ("bits", "the dense expert of the routed layers holds only that part of it that was not"),
        ("averaged", "the average of 3 averaged layers still holds it; the dense expert of the"),
        ("base", "no layer holds it now"),
    ],
)
def test_the_command_says_where_the_expert_stays(fresh, form, stays):
    result = call("remove-expert", fresh(form), "code")
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"expert code was removed: {stays}")
    assert result.output.endswith("experts: math, chat\n")


def test_the_share_leaves_the_dense_weights_as_far_as_it_was_stored(make, tmp_path, read):
    family = make(dtype=torch.float32)
    out = edits.build(tmp_path / "out", family, bits=16, route="all")
    remove_expert(out, "code")
    base, dense = read(family.base), read(out)
    experts = [read(family.experts[name]) for name in ("math", "chat")]
    for name, weight in dense.items():
        left = base[name] + sum(expert[name] - base[name] for expert in experts) / 3
        assert torch.allclose(weight, left, atol=2e-3), name


def test_the_calibrated_router_is_fitted_to_the_others(fresh, tmp_path):
    out = edits.calibrate(fresh("density"), edits.data(tmp_path))
    before = CalibratedRouter.load(out / ROUTER)
    remove_expert(out, "code")
    manifest = edits.check(out, ("math", "chat"))
    after = CalibratedRouter.load(out / ROUTER, ("math", "chat"))
    decision = after.decide(before.features["chat"])
    assert decision.weights.argmax(dim=1).tolist() == [1] * 20
    assert set(manifest.router["data"]) == {"math", "chat"}
    assert "stale" not in manifest.router


def test_a_router_of_hidden_states_is_stale_if_the_dense_expert_changed(fresh, tmp_path):
    files = edits.data(tmp_path)
    out = edits.calibrate(fresh("bits"), files, kind="hidden")
    remove_expert(out, "code")
    assert "come from the dense expert before" in edits.check(out, ("math", "chat")).router["stale"]
    with pytest.warns(UserWarning, match="the calibrated router is stale: its features come from"):
        MediatorModel.from_pretrained(out)
    assert "the calibrated router is stale: its features" in call("inspect", out).output
    added = call("calibrate", out, "--add", f"math={files['math']}")
    assert (
        "no data for chat: the features that the router holds come from an earlier" in added.output
    )
    options = [text for name in ("math", "chat") for text in ("--data", f"{name}={files[name]}")]
    assert call("calibrate", out, *options).exit_code == 0
    assert "stale" not in read_manifest(out).router


def test_a_router_of_one_expert_goes(fresh, tmp_path):
    out = edits.calibrate(fresh("density"), edits.data(tmp_path))
    remove_expert(out, "code")
    remove_expert(out, "math")
    manifest = edits.check(out, ("chat",))
    assert manifest.router is None
    assert not (out / ROUTER).exists()


def test_the_last_expert_stays(fresh):
    out = fresh("base")
    remove_expert(out, "code")
    remove_expert(out, "math")
    with pytest.raises(EditError, match="chat is the last expert"):
        remove_expert(out, "chat")
    with pytest.raises(EditError, match="has no expert 'math': name one of chat"):
        remove_expert(out, "math")
    edits.check(out, ("chat",))


def test_adapters_give_back_their_share(artifact, tmp_path):
    out = edits.copied(artifact, tmp_path / "out")
    want = edits.served(out, "chat")
    remove_expert(out, "math")
    manifest = edits.check(out, ("code", "chat"))
    assert "stale" not in manifest.router  # the embedding, which it reads, stays
    for name, weight in edits.served(out, "chat").items():
        assert torch.allclose(weight, want[name], rtol=1e-5, atol=1e-6), name
