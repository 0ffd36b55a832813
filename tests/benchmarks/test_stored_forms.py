"""Every form of rates.py gives weights back and counts its bits; training of heavy experts goes on."""

import argparse
import json
import math

import heavy_training
import numpy as np
import pico
import pytest
import rates
import stored_forms
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def change():
    torch.manual_seed(0)
    model = pico.gemma3().bfloat16()
    expert = pico.perturbed(model, seed=1).state_dict()
    base = model.state_dict()
    expert["model.embed_tokens.weight"] = base["model.embed_tokens.weight"]
    names = [name for name in base if name != "lm_head.weight"]
    return stored_forms.Change({n: base[n] for n in names}, {n: expert[n] for n in names})


def error(change, weights):
    return sum(
        float((weights[n].float() - change.expert[n].float()).square().sum()) for n in weights
    )


@pytest.mark.parametrize(
    "form",
    [
        f
        for f in stored_forms.forms()
        if not f.startswith(("ours 0", "ours as signs", "random signs"))
    ],
)
def test_a_form_comes_nearer_to_the_expert_than_the_base_is(change, form):
    weights, bits = stored_forms.forms()[form](change)
    assert weights.keys() == change.base.keys()
    assert bits > 0
    assert error(change, weights) < 0.99 * error(change, change.base)
    assert all(weights[n].dtype == torch.bfloat16 for n in weights)


def test_random_signs_are_as_long_in_the_direction_of_the_change_as_it_is(change):
    """Their error is larger than the change, and has no direction."""
    forms = [form for form in stored_forms.forms("random signs") if form != "random signs 0.03"]
    for form in forms:  # the pico weights have too few places for the smallest share
        weights, bits = stored_forms.forms()[form](change)
        kept = sum(
            float(((weights[n].float() - change.base[n].float()) * difference).sum())
            for n, difference in change.differences.items()
        )
        assert 0.7 < kept / change.energy < 1.3
        assert all(weights[n].dtype == torch.bfloat16 for n in weights)
        assert bits > 0


@pytest.mark.parametrize(
    "family", ["ours", "extract-lora", "8-3-2", "sign first", "ternary", "random signs"]
)
def test_more_bits_come_nearer(change, family):
    # a pico expert's vectors alone take more than the smallest rates
    small = ("ours 0", "ours as signs")
    wanted = [f for f in stored_forms.forms(family) if not f.startswith(small)]
    found = [stored_forms.forms()[form](change) for form in wanted]
    bits = [b for _, b in found]
    errors = [error(change, weights) for weights, _ in found]
    assert bits == sorted(bits)
    assert errors == sorted(errors, reverse=True)


def test_a_weight_that_did_not_change_costs_nothing(change):
    assert "model.embed_tokens.weight" not in change.base
    assert change.numel == sum(weight.numel() for weight in change.base.values())
    _, bits = stored_forms.forms()["one bit"](change)
    vectors = sum(w.numel() for w in change.base.values() if w.ndim == 1)
    matrices = change.numel - vectors
    scales = 16 * len(change.matrices)
    assert bits == pytest.approx((matrices + scales + 16 * vectors) / change.numel)


def test_the_gain_is_the_way_from_the_base_to_the_expert(change):
    found = iter([-3.0, -1.0, -2.0, -4.0, 0.0])  # of the base, of the expert, of three forms
    forms = {bits: lambda c, bits=bits: (c.expert, bits) for bits in (0.5, 0.1, 1)}
    rows = list(rates.measure(change, lambda weights: next(found), forms))
    assert [row["gain_kept"] for row in rows] == [0.5, 0.0, 1.0]
    assert [row["bits_per_parameter"] for row in rows] == [0.5, 0.1, 1]


def test_threads_store_what_one_thread_stores(change):
    together = stored_forms.Change(change.base, change.expert, workers=2)
    for form in ("ours 2", "extract-lora 4", "8-3-2 bits 2", "sign first, rank 4", "ternary 0.2"):
        (weights, bits), (same, as_many) = (
            stored_forms.forms()[form](c) for c in (change, together)
        )
        assert bits == as_many
        assert weights.keys() == same.keys()
        assert all(torch.equal(weight, same[name]) for name, weight in weights.items())


@pytest.mark.parametrize("setting", stored_forms.SETTINGS)
def test_other_settings_of_our_form_store_other_weights(change, setting):
    usual, _ = stored_forms.ours(change, 2.0)
    other, _ = stored_forms.ours(change, 2.0, **stored_forms.SETTINGS[setting])
    assert any(not torch.equal(usual[name], other[name]) for name in usual)
    assert rates.left_out(change, other) < 0.99


def test_what_the_base_leaves_out_is_the_whole_change(change):
    assert rates.left_out(change, change.base) == pytest.approx(1.0)
    assert rates.left_out(change, change.expert) == 0.0


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setattr(heavy_training, "ROW", 16)
    torch.manual_seed(0)
    pico.llama_tied().bfloat16().save_pretrained(tmp_path / "base")
    pico.tokenizer().save_pretrained(tmp_path / "base")
    return argparse.Namespace(
        out=tmp_path, tokens=4 * 32, batch=2, lr=1e-2, device="cpu", seconds=math.inf
    )


@pytest.fixture
def rows():
    return np.random.default_rng(0).integers(4, 60, (5, 16), dtype=np.int32)


def test_training_that_was_interrupted_ends_where_it_would_have(settings, rows, monkeypatch):
    heavy_training.train("python", settings, rows)
    whole = load_file(settings.out / "python/model.safetensors")
    (settings.out / "python/expert.json").unlink()
    monkeypatch.setattr(heavy_training, "SAVED_EVERY", -1)
    update, seen = heavy_training.Training.update, []

    def interrupted(training, *arguments):
        if training.step == 2 and not seen:
            seen.append(training.step)
            raise KeyboardInterrupt
        return update(training, *arguments)

    monkeypatch.setattr(heavy_training.Training, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        heavy_training.train("python", settings, rows)
    assert (settings.out / "python/training.safetensors").exists()
    heavy_training.train("python", settings, rows)
    again = load_file(settings.out / "python/model.safetensors")
    assert all(torch.equal(weight, again[name]) for name, weight in whole.items())
    assert not (settings.out / "python/training.safetensors").exists()


def test_training_ends_when_its_time_is_over(settings, rows):
    settings.seconds = 1e-9
    heavy_training.train("python", settings, rows)
    notes = json.loads((settings.out / "python/expert.json").read_text())
    assert notes["tokens"] == notes["distinct_tokens"] == 32


def test_the_optimizer_keeps_what_bfloat16_rounds_off(settings, rows):
    training = heavy_training.Training(settings.out / "base", settings.out / "none", 1e-6, "cpu")
    before = {name: p.clone() for name, p in training.parameters.items()}
    training.update(torch.from_numpy(rows).long(), {}, 1.0)
    assert all(p.dtype == torch.float32 for p in training.parameters.values())
    assert all(not torch.equal(p, before[name]) for name, p in training.parameters.items())
    for name, p in training.computed.items():
        assert torch.equal(p, training.parameters[name].to(p.dtype))


def test_a_sparse_expert_changes_no_more_parameters_than_it_may(settings, rows):
    heavy_training.train("python-sparse", settings, rows)
    base = load_file(settings.out / "base/model.safetensors")
    expert = load_file(settings.out / "python-sparse/model.safetensors")
    changed = sum(int((expert[name] != weight).sum()) for name, weight in base.items())
    numel = sum(weight.numel() for weight in base.values())
    assert 0.05 * numel < changed < 0.17 * numel
