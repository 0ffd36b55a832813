"""`keep:` in a merge configuration, through the stock command."""

import json
import math
from functools import partial

import pico
import pytest
from commands import call, figures, write
from mergekit.common import ModelReference

from mergekit_mediator.merge import lessons
from mergekit_mediator.merge.config import MediatorConfig
from mergekit_mediator.merge.experts import tuning
from mergekit_mediator.merge.experts.keep import CORRECTIONS, corrected, warn_of_cap
from mergekit_mediator.store.manifest import read_manifest
from mergekit_mediator.tune.teacher import answer

MATH, CODE = (ModelReference.parse(f"org/{name}") for name in ("math", "code"))


@pytest.fixture(scope="module")
def wide(make):
    return make(lambda: pico.llama(hidden_size=128, intermediate_size=384, head_dim=64))


def expert_bytes(out):
    return [
        read_manifest(out).files[f"mediator/{e.file}"].bytes for e in read_manifest(out).experts
    ]


def kept(out):
    return read_manifest(out).parameters["kept"]


def test_more_kept_takes_more_bytes_of_every_expert(wide, merged):
    less, more = (merged(wide.config(keep=keep), name=f"out{keep}") for keep in (0.9, 0.999))
    assert all(a < b for a, b in zip(expert_bytes(less), expert_bytes(more), strict=True))
    for out, keep in ((less, 0.9), (more, 0.999)):
        assert list(kept(out)) == list(wide.experts)
        assert all(keep <= part["predicted"] < keep + 0.01 for part in kept(out).values())


def test_keep_is_the_default(wide, merged):
    plain = wide.config(keep=0.99)
    silent = {**plain, "parameters": {}}
    given, default = merged(plain, name="given"), merged(silent, name="default")
    assert expert_bytes(given) == expert_bytes(default)
    assert read_manifest(default).parameters["keep"] == 0.99


def test_a_budget_that_suffices_changes_nothing(wide, merged):
    free = merged(wide.config(keep=0.9), name="free")
    capped = merged(wide.config(keep=0.9, budget="9x"), name="capped")
    assert expert_bytes(free) == expert_bytes(capped)


def test_a_budget_below_what_keep_needs_holds_and_says_what_is_kept(wide, mergekit_yaml, tmp_path):
    out = tmp_path / "out"
    warning = mergekit_yaml(wide.config(keep=0.9999, budget="1.2x"), out).output
    assert "warning: budget: 1.2x is too little to keep 0.9999" in warning
    least = min(part["predicted"] for part in kept(out).values())
    assert f"{least:.4f} of its gain: raise the budget, or lower keep" in warning
    files = [p for p in out.iterdir() if p.name not in ("README.md", "mergekit_config.yml")]
    dense = sum(p.stat().st_size for p in files if p.is_file())
    assert sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) <= 1.2 * dense


def test_plan_shows_the_bytes_that_a_merge_then_takes(wide, merged, tmp_path):
    config = wide.config(keep=0.97)
    path = write(config, tmp_path / "config.yml")
    points = {p["keep"]: p for p in figures("plan", path, "--curve", "--quiet")["keep"]}
    assert list(points) == [0.9, 0.97, 0.99, 0.999]
    assert sum(expert_bytes(merged(config))) == pytest.approx(points[0.97]["expert_bytes"], rel=0.3)
    shown = call("plan", path, "--curve", "--quiet").output
    assert all(f"{point['over_dense']:.3f}x" in shown for point in points.values())


def test_plan_without_weights_says_how_to_learn_the_bytes(wide, tmp_path):
    shown = call("plan", write(wide.config(keep=0.97), tmp_path / "config.yml"), "--quiet").output
    assert "How many bytes keep 0.97 depends on the weights: --curve predicts it." in shown


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(lessons, "answer", partial(answer, answer_tokens=8))
    path = tmp_path / "prompts.jsonl"
    texts = [f"w{i} w{(7 * i) % 60} w{(3 * i + 1) % 60}" for i in range(16)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def test_prompts_measure_what_is_kept_and_correct_the_rate(
    wide, merged, prompts, tmp_path, monkeypatch
):
    config = wide.config(keep=0.9)
    config["models"][0]["parameters"]["prompts"] = str(prompts)
    rounds = []
    original = tuning.Tuning.tune

    def counting(*arguments):
        rounds.append(1)
        return original(*arguments)

    monkeypatch.setattr(tuning.Tuning, "tune", counting)
    out = merged(config)
    assert 1 <= len(rounds) <= 1 + CORRECTIONS
    math_part, code_part, _ = kept(out).values()
    assert math_part["measured"] <= 1
    assert code_part["measured"] is None
    shown = call("inspect", out).output
    assert f"{math_part['measured']:.4f} measured" in shown
    assert f"{code_part['predicted']:.4f} predicted" in shown
    card = (out / "README.md").read_text()
    assert f"- math: {math_part['measured']:.4f}, measured on held-out prompts" in card
    assert f"- code: {code_part['predicted']:.4f}, predicted" in card


def test_a_correction_aims_at_more_where_less_is_measured():
    targets = {MATH: 0.99, CODE: 0.99}
    new = corrected(0.99, targets, {MATH: 0.9})
    assert new[CODE] == 0.99
    # a tenth is lost where a hundredth was predicted: a ten-thousandth is aimed at
    assert new[MATH] == pytest.approx(0.9999)


def test_a_correction_aims_at_less_where_more_is_measured():
    new = corrected(0.99, {MATH: 0.99}, {MATH: 0.9999})
    assert new[MATH] == pytest.approx(1 - math.sqrt(0.01))


@pytest.mark.parametrize("measured", [0.9895, 0.993])
def test_a_measured_part_that_is_near_enough_is_left_alone(measured):
    assert corrected(0.99, {MATH: 0.98}, {MATH: measured}) == {MATH: 0.98}


@pytest.mark.parametrize("measured", [-0.5, 1.0, 1.2])
def test_a_correction_of_scattered_figures_is_bounded(measured):
    assert 0 < corrected(0.99, {MATH: 0.99}, {MATH: measured})[MATH] < 1


@pytest.mark.parametrize(("budget", "warns"), [("2x", True), (None, False)])
def test_a_budget_is_too_little_only_if_less_is_kept_than_was_aimed_at(capsys, budget, warns):
    config = MediatorConfig(
        base_model=MATH, experts={MATH: "math", CODE: "code"}, keep=0.99, budget=budget
    )
    # prompts showed that 0.9 by prediction are enough
    targets = {MATH: 0.9, CODE: 0.99}
    warn_of_cap(config, targets, {MATH: 0.9, CODE: 0.99})
    assert not any(capsys.readouterr())
    warn_of_cap(config, targets, {MATH: 0.88, CODE: 0.99})
    said = "".join(capsys.readouterr())
    assert ("math is predicted to keep 0.8800 of its gain" in said) == warns
