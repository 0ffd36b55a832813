"""A `budget` beside `prompts`: divided by what it does to answers."""

import json
import math
from functools import partial

import pico
import pytest
from commands import call
from mergekit.common import ModelReference

from mergekit_mediator.merge import lessons
from mergekit_mediator.merge.experts import division, tuning
from mergekit_mediator.merge.experts.division import CORRECTIONS, measure_divergences
from mergekit_mediator.merge.experts.spectra import Spectra
from mergekit_mediator.store.manifest import read_manifest
from mergekit_mediator.tune.teacher import answer

MATH, CODE = (ModelReference.parse(f"org/{name}") for name in ("math", "code"))


class Measuring:
    """Stands for the tuning: an expert diverges by its slope and a factor of its own."""

    def __init__(self, **factors):
        self.factors = {ModelReference.parse(f"org/{n}"): f for n, f in factors.items()}
        self.calls = 0

    def divergences(self, slopes):
        self.calls += 1
        return {model: factor * slopes[model] for model, factor in self.factors.items()}


class Written(dict):
    """Slopes that stand for files."""

    def values(self):
        return ()


def divide(measured):
    """Two experts whose slopes multiply to 1; the one that diverges more gets the finer one."""
    if not measured:
        return {MATH: 1.0, CODE: 1.0}
    factor = {m: list(d.values())[-1] / list(d)[-1] for m, d in measured.items()}
    part = math.sqrt(factor[CODE] / factor[MATH])
    return {MATH: part, CODE: 1 / part}


def test_experts_are_measured_until_their_slopes_stay():
    measuring = Measuring(math=4.0, code=1.0)
    measured = measure_divergences(measuring, divide, Written)
    assert measuring.calls == 2
    assert measured == {MATH: {1.0: 4.0, 0.5: 2.0}, CODE: {1.0: 1.0, 2.0: 2.0}}


def test_a_division_that_is_right_is_measured_once():
    measuring = Measuring(math=1.0, code=1.0)
    measure_divergences(measuring, divide, Written)
    assert measuring.calls == 1


def test_corrections_end():
    measuring = Measuring(math=1.0)
    turn = iter(range(100))
    measure_divergences(measuring, lambda _: {MATH: 2.0 ** next(turn)}, Written)
    assert measuring.calls == CORRECTIONS


@pytest.fixture(scope="module")
def wide(make):
    return make(lambda: pico.llama(hidden_size=128, intermediate_size=384, head_dim=64))


@pytest.fixture
def config(wide, tmp_path, monkeypatch):
    """A budget, and prompts of two experts of three."""
    monkeypatch.setattr(lessons, "answer", partial(answer, answer_tokens=8))
    path = tmp_path / "prompts.jsonl"
    texts = [f"w{i} w{(7 * i) % 60} w{(3 * i + 1) % 60}" for i in range(16)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    config = wide.config(budget="1.3x")
    for entry in config["models"][:2]:
        entry["parameters"]["prompts"] = str(path)
    return config


def test_prompts_divide_a_budget(wide, merged, config, monkeypatch):
    decomposed, answered = [], []
    decompose, answers = Spectra.decompose, lessons.answer
    monkeypatch.setattr(
        Spectra, "decompose", lambda *a: (decomposed.append(a[1:3]), decompose(*a))[1]
    )
    monkeypatch.setattr(lessons, "answer", lambda *a: (answered.append(1), answers(*a))[1])
    out = merged(config)
    assert len(decomposed) == len(set(decomposed))
    assert len(answered) == 2
    manifest = read_manifest(out)
    sizes = {name: file.bytes for name, file in manifest.files.items()}
    assert sum(sizes.values()) <= 1.3 * sum(n for name, n in sizes.items() if "/" not in name)
    math_part, code_part, chat_part = manifest.parameters["kept"].values()
    assert 1 <= len(math_part["divergences"]) == len(code_part["divergences"]) <= CORRECTIONS
    assert math_part["measured"] <= 1
    assert chat_part["measured"] is None
    assert not chat_part["divergences"]
    tried = ", ".join(f"{nats:.2g}" for nats in math_part["divergences"])
    assert f"nats per answer: math {tried}; code " in call("inspect", out).output
    assert f"nats per answer: math {tried}; code " in (out / "README.md").read_text()


def test_the_expert_whose_answers_diverge_more_gets_more(merged, config, monkeypatch):
    sizes = []
    for factors in ((100.0, 1.0), (1.0, 100.0)):
        original = tuning.Tuning.divergences

        def scaled(self, files, factors=factors, original=original):
            measured = original(self, files)
            return {m: f * d for f, (m, d) in zip(factors, measured.items(), strict=True)}

        with monkeypatch.context() as patch:
            patch.setattr(division.Tuning, "divergences", scaled)
            out = merged(config, name=f"out{len(sizes)}")
        files = read_manifest(out).files
        sizes.append([files[f"mediator/experts/{n}.safetensors"].bytes for n in ("math", "code")])
    assert sizes[0][0] > 1.1 * sizes[0][1]
    assert sizes[1][1] > 1.1 * sizes[1][0]


def test_a_budget_that_keep_does_not_need_is_not_divided(merged, config, monkeypatch):
    config["parameters"] |= {"budget": "9x", "keep": 0.9}
    monkeypatch.setattr(tuning.Tuning, "divergences", None)
    kept = read_manifest(merged(config)).parameters["kept"]
    assert not any(part["divergences"] for part in kept.values())
