import adapters
import edits
import pico
import pytest
import torch
from commands import call

from mergekit_mediator.errors import ArtifactError, ConfigError, EditError, InputError, OutputError
from mergekit_mediator.merge.editing.add import add_expert
from mergekit_mediator.merge.editing.remove import remove_expert
from mergekit_mediator.merge.editing.rename import rename_expert
from mergekit_mediator.merge.editing.requantize import requantize
from mergekit_mediator.route.calibrated import CalibratedRouter
from mergekit_mediator.route.response import ResponseRouter
from mergekit_mediator.store.manifest import RESPONSE, ROUTER, read_manifest

FOUR = ("math", "code", "chat", "law")


@pytest.fixture(scope="module")
def law(family, tmp_path_factory):
    """One more fine-tune of the family's base."""
    return edits.one_more(family, tmp_path_factory.mktemp("law"))


@pytest.mark.parametrize("form", edits.FORMS)
def test_the_others_stay_and_the_new_one_answers_as_its_model(
    fresh, artifacts, family, read, law, form
):
    out, before = fresh(form), read_manifest(artifacts(form))
    storage = {"density": 1.0} if form == "density" else {"bits": 12}
    add_expert(out, str(law), "law", **storage)
    manifest = edits.check(out, FOUR)
    edits.same_files(before, manifest, RESPONSE)
    assert manifest.experts[3].weight == 0
    for mixture in ("code", {"math": 0.5, "chat": 0.5}):
        want = edits.served(artifacts(form), mixture)
        got = edits.served(out, mixture)
        assert all(torch.equal(got[name], weight) for name, weight in want.items())
    expert, base, dense = read(law), read(family.base), read(out)
    stored = {name: edits.changes(out, name) for name in FOUR}
    shares = dict.fromkeys(edits.NAMES, 1 / 3 if form in ("bits", "averaged") else 0)
    routed = {w for layer in manifest.routed_layers for w in layer.weights}
    assert routed == set(expert) or form == "averaged"
    for name, weight in edits.served(out, "law").items():
        if name not in routed:
            assert torch.equal(weight, dense[name]), name
        elif form == "density":
            assert torch.equal(weight, expert[name]), name
        else:
            tau, change = expert[name].float() - base[name].float(), stored["law"][name]
            assert (change - tau).norm() < 0.1 * tau.norm(), name
            held = sum(share * stored[n].get(name, 0) for n, share in shares.items())
            want = dense[name].float() - held + change
            assert torch.allclose(weight.float(), want, rtol=2**-7, atol=2**-9), name


def test_a_blend_with_the_new_expert_is_the_blend_of_both(make, tmp_path, read):
    family = make(dtype=torch.float32)
    out = edits.build(tmp_path / "out", family, bits=16, route="all")
    law = edits.one_more(family, tmp_path)
    add_expert(out, str(law), "law")
    want = {"math": read(family.experts["math"]), "law": read(law)}
    for name, weight in edits.served(out, {"math": 0.25, "law": 0.75}).items():
        blend = 0.25 * want["math"][name] + 0.75 * want["law"][name]
        assert torch.allclose(weight, blend, atol=1e-2), name


def test_the_form_is_that_of_the_merge_unless_the_command_says_otherwise(fresh, law):
    for form, parameters in (("density", {"density": 0.5}), ("bits", {"bits": 4})):
        (change,) = add_expert(fresh(form), str(law), "law").changes
        assert parameters.items() <= change.details.items()


def test_a_budget_of_the_merge_becomes_the_rate_of_its_experts(family, tmp_path, law):
    out = edits.build(tmp_path / "out", family, budget="2.6x")
    edited = add_expert(out, str(law), "law")
    sizes = [edited.manifest.files[f"mediator/experts/{name}.safetensors"].bytes for name in FOUR]
    assert 0.8 * min(sizes[:3]) < sizes[3] < 1.2 * max(sizes[:3])
    assert set(edited.manifest.parameters["slopes"]) == set(FOUR)


def test_the_kept_parts_follow_experts_that_are_added_renamed_requantized_and_removed(
    family, tmp_path, law
):
    out = edits.build(tmp_path / "out", family, keep=0.9)
    kept = add_expert(out, str(law), "law").manifest.parameters["kept"]
    assert set(kept) == set(FOUR)
    assert kept["law"]["predicted"] >= 0.9
    renamed = rename_expert(out, "law", "tax").manifest.parameters
    assert renamed["kept"]["tax"] == kept["law"]
    assert set(renamed["slopes"]) == set(renamed["kept"]) == {*FOUR[:3], "tax"}
    smaller = requantize(out, bits=1, experts=["math"]).manifest.parameters
    assert set(smaller["kept"]) == {*FOUR[1:3], "tax"}
    left = remove_expert(out, "tax").manifest.parameters
    assert set(left["kept"]) == set(FOUR[1:3])
    assert set(left["slopes"]) == set(FOUR[:3])


def test_a_budget_of_the_command_bounds_the_whole_directory(fresh, law):
    out = fresh("bits")
    checkpoint = sum(p.stat().st_size for p in out.iterdir() if p.is_file())
    total = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    budget = total + 25_000
    result = call("add-expert", out, law, "--name", "law", "--budget", f"{budget}B")
    assert result.exit_code == 0, result.output
    assert checkpoint < sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) <= budget
    remove_expert(out, "law")
    with pytest.raises(ConfigError, match=r"budget: .* alone take .*: raise it"):
        add_expert(out, str(law), "law", budget=f"{checkpoint + 100}B")


def test_an_adapter_keeps_its_factors(artifact, make, tmp_path):
    base = read_manifest(artifact).base.source
    change = adapters.train(base, tmp_path / "law", seed=9, r=2)
    out = edits.copied(artifact, tmp_path / "out")
    dense = edits.served(out, {"math": 1.0})
    edited = add_expert(out, str(tmp_path / "law"), "law")
    assert "stored by its own factors" in edited.changes[0].note
    assert edited.manifest.experts[3].source == f"{base}+{tmp_path / 'law'}"
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    for name, weight in edits.served(out, "law").items():
        assert torch.allclose(weight, plain[name] + change.get(name, 0), atol=1e-5), name
    assert all(torch.equal(w, dense[n]) for n, w in edits.served(out, "math").items())
    full = edits.one_more(type("Family", (), {"base": base}), tmp_path, "full")
    with pytest.raises(EditError, match=r"a plain LoRA adapter of the base required, .* --bits"):
        add_expert(out, str(full), "full")
    add_expert(out, str(full), "full", bits=6)
    assert "slopes" in edits.check(out, (*FOUR, "full")).parameters


def test_the_response_router_gets_a_row_as_a_merge_would_give(fresh, law, family, artifacts, read):
    out = fresh("density")
    add_expert(out, str(law), "law")
    before, after = (ResponseRouter.load(p / RESPONSE) for p in (artifacts("density"), out))
    assert after.experts == FOUR
    base, expert = read(family.base), read(law)
    for name, directions in after.directions.items():
        old = before.directions[name].float()
        assert torch.allclose(directions[:3].float(), old, rtol=1e-2, atol=1e-4)
        tau = (expert[name].float() - base[name].float()) / (
            expert[name].float() - base[name].float()
        ).norm()
        found = torch.nn.functional.normalize(directions[3].float(), dim=1)
        exact = torch.linalg.svdvals(tau)[:4]
        assert torch.allclose((tau @ found.T).norm(dim=0), exact, rtol=0.15)


def test_without_prompts_the_calibrated_router_is_stale_and_with_them_it_is_fitted(
    fresh, law, tmp_path
):
    files = edits.data(tmp_path, (*edits.NAMES, "law"))
    out = edits.calibrate(fresh("density"), {name: files[name] for name in edits.NAMES})
    before = CalibratedRouter.load(out / ROUTER)
    result = call("add-expert", out, law, "--name", "law")
    assert (
        "the calibrated router is stale: it chooses no law, which it does not know" in result.output
    )
    manifest = edits.check(out, FOUR)
    assert manifest.router["experts"] == list(edits.NAMES)
    rename_expert(out, "law", "tax")
    assert "chooses no tax" in edits.check(out, (*FOUR[:3], "tax")).router["stale"]
    remove_expert(out, "tax")
    assert "stale" not in edits.check(out, edits.NAMES).router

    add_expert(out, str(law), "law", data=files["law"])
    manifest = edits.check(out, FOUR)
    assert "stale" not in manifest.router
    router = CalibratedRouter.load(out / ROUTER, FOUR)
    assert all(torch.equal(router.features[name], x) for name, x in before.features.items())
    chosen = router.decide(router.features["law"]).weights.argmax(dim=1)
    assert (chosen == 3).float().mean() > 0.9


def test_calibrate_add_ends_the_staleness(fresh, law, tmp_path):
    files = edits.data(tmp_path, (*edits.NAMES, "law"))
    out = edits.calibrate(fresh("density"), {name: files[name] for name in edits.NAMES})
    add_expert(out, str(law), "law")
    result = call("calibrate", out, "--add", f"law={files['law']}")
    assert result.exit_code == 0, result.output
    assert "stale" not in edits.check(out, FOUR).router


def test_the_command_tells_how_much_is_in_averaged_layers(fresh, law, family, read):
    out = fresh("averaged")
    result = call("add-expert", out, law, "--name", "law")
    assert result.exit_code == 0, result.output
    base, expert = read(family.base), read(law)
    routed = {w for layer in read_manifest(out).routed_layers for w in layer.weights}
    energy = {n: float((expert[n].float() - w.float()).square().sum()) for n, w in base.items()}
    outside = sum(e for n, e in energy.items() if n not in routed) / sum(energy.values())
    assert f": {100 * outside:.1f}% of its squared change is in averaged layers" in result.output


def test_all_that_were_merged_may_leave_after_one_was_added(fresh, law):
    out = fresh("bits")
    add_expert(out, str(law), "law", bits=12)
    want = edits.served(out, "law")
    for name in edits.NAMES:
        remove_expert(out, name)
    edits.check(out, ("law",))
    for name, weight in edits.served(out, "law").items():
        assert torch.allclose(weight, want[name], rtol=2**-5, atol=2**-8), name
    removed = call("remove-expert", out, "law")
    assert "law is the last expert" in removed.output


def _wrong(family, law, tmp_path, kind):
    """Arguments of a call that must be refused."""
    if kind == "architecture":
        return edits.one_more_of(pico.qwen3, tmp_path / "other"), {}
    if kind == "shape":
        return edits.one_more_of(lambda: pico.llama(intermediate_size=32), tmp_path / "other"), {}
    return str(law), {"base": family.experts["math"]}


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("architecture", InputError, "its architecture is Qwen3ForCausalLM, but the base"),
        ("shape", InputError, r"shape \[.* experts must be fine-tunes of the base"),
        ("base", ArtifactError, "name the directory of the base of this artifact"),
    ],
)
def test_a_model_or_a_base_that_does_not_fit_is_refused(
    fresh, family, law, tmp_path, kind, error, message
):
    out = fresh("density")
    before = read_manifest(out)
    model, options = _wrong(family, law, tmp_path, kind)
    with pytest.raises(error, match=message):
        add_expert(out, str(model), "law", **options)
    assert edits.check(out, edits.NAMES) == before


@pytest.mark.parametrize(
    ("form", "name", "options", "error", "message"),
    [
        ("density", "math", {}, EditError, "expert name 'math': another expert has it"),
        ("density", "Law", {}, EditError, "expert name 'Law': 1 to 64 characters"),
        ("density", "law", {"bits": 2}, EditError, "bits: .* give --density or --rank"),
        ("bits", "law", {"density": 0.1}, EditError, "density: .* give --bits or --budget"),
        ("bits", "law", {"bits": 2, "budget": "2x"}, ConfigError, "contradict each other"),
        ("density", "law", {"density": 2}, ConfigError, r"density must be a number in \(0, 1\]"),
        ("density", "law", {"rank": 99}, ConfigError, "rank: at most"),
    ],
)
def test_what_cannot_be_added_is_refused_in_one_line(
    fresh, law, form, name, options, error, message
):
    out = fresh(form)
    before = read_manifest(out)
    with pytest.raises(error, match=message) as raised:
        add_expert(out, str(law), name, **options)
    assert "\n" not in str(raised.value)
    assert read_manifest(out) == before
    assert not list(out.parent.glob(".*"))


def test_prompts_need_a_calibrated_router(fresh, law, tmp_path):
    files = edits.data(tmp_path, ("law",))
    with pytest.raises(EditError, match="has no calibrated router to fit again"):
        add_expert(fresh("density"), str(law), "law", data=files["law"])


def test_the_artifact_itself_and_a_base_that_is_gone_are_refused(make, tmp_path):
    family = make()
    out = edits.build(tmp_path / "out", family, density=0.5)
    with pytest.raises(OutputError, match="is the directory of"):
        add_expert(out, str(out), "law")
    law = edits.one_more(family, tmp_path)
    family.base.rename(tmp_path / "elsewhere")
    with pytest.raises(EditError, match=r"is not on this machine, .* with --base"):
        add_expert(out, str(law), "law")
    add_expert(out, str(law), "law", base=tmp_path / "elsewhere")
    edits.check(out, FOUR)
