"""heavy.py trains, describes, stores and merges, and does nothing twice."""

import itertools
import json
import sys

import heavy
import heavy_texts
import heavy_training
import pico
import pytest
import record
import torch


def documents(*_):
    """Words that follow one another in one order, so that there is something to learn."""
    for start in itertools.count():
        yield " ".join(pico.WORDS[(7 * start + i) % 12] for i in range(40))


@pytest.fixture
def run(tmp_path, monkeypatch):
    for module in (heavy, heavy_texts, heavy_training):
        monkeypatch.setattr(module, "ROW", 16)
    monkeypatch.setattr(heavy, "BUDGETS", ("9x",))
    monkeypatch.setattr(heavy_texts, "DOCUMENTS", {"python": documents})
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    torch.manual_seed(0)
    pico.llama_tied().bfloat16().save_pretrained(tmp_path / "base")
    pico.tokenizer().save_pretrained(tmp_path / "base")
    words = ["heavy.py", "--out", str(tmp_path), "--tokens", "640", "--batch", "2", "--lr", "0.01"]
    words += ["--kind", "python", "--kind", "python-sparse", "--held-out", "4"]

    def main(forms):
        monkeypatch.setattr(sys, "argv", [*words, "--forms", forms])
        with torch.random.fork_rng():
            heavy.main()
        return json.loads((tmp_path / "results/heavy.json").read_text())["rows"]

    return main


def test_experts_are_trained_described_stored_and_merged(run):
    rows = run("ours 2,budget")
    assert [(row["expert"], row["form"]) for row in rows] == [
        (expert, form) for expert in ("python", "python-sparse") for form in ("ours 2", "budget 9x")
    ]
    assert all(row["tokens"] == 640 and row["distinct_tokens"] == 640 for row in rows)
    assert all(row["expert_nats"] > row["base_nats"] for row in rows)
    assert all(row["gain_kept"] > (0.99 if row["form"] == "budget 9x" else 0.5) for row in rows)
    dense, sparse = rows[0], rows[2]
    assert dense["changed_share"] > 0.8
    assert sparse["changed_share"] < 0.16
    assert 0 < sparse["norm_over_base"] < dense["norm_over_base"]


def test_what_is_measured_is_not_measured_again(run, monkeypatch):
    first = run("one bit")
    monkeypatch.setattr(heavy_training, "Training", None)
    rows = run("one bit,two bits")
    assert rows[:2] == first
    assert [row["form"] for row in rows] == ["one bit", "one bit", "two bits", "two bits"]


def test_processes_that_train_and_measure_find_what_one_finds(run, monkeypatch):
    together = run("one bit")
    heavy.record.RESULTS.joinpath("heavy.json").unlink()
    monkeypatch.setattr(heavy_training, "SAVED_EVERY", 1e9)
    usual = sys.argv
    for words in (
        ["--part", "train"],
        ["--part", "measure", "--name", "b", "--kind", "python-sparse", "--workers", "2"],
        ["--part", "measure", "--name", "a", "--kind", "python", "--workers", "2"],
        ["--join", "a", "--join", "b", "--join", "not yet"],
    ):
        kept = [w for i, w in enumerate(usual) if not {"--kind"} & {w, usual[i - 1]}]
        kinds = [] if "--kind" in words else ["--kind", "python", "--kind", "python-sparse"]
        monkeypatch.setattr(sys, "argv", [*kept, *kinds, *words])
        heavy.main()
    joined = heavy.record.read("heavy")
    assert joined["rows"] == together
    assert "--name a" in joined["command"]
    assert "--name b" in joined["also"]["b"]["command"]


def test_german_is_told_from_english_and_markup_goes(tmp_path):
    (tmp_path / "de").mkdir()
    german = "<p>Der Hund und die Katze sind nicht mit dem Vogel auf der Wiese.</p>"
    english = "<p>The dog and the cat are not with the bird in the meadow, and all of them will die young.</p>"
    (tmp_path / "de/a.html").write_text(german)
    (tmp_path / "de/again.html").write_text(german)
    (tmp_path / "de/b.html").write_text(english)
    found = [
        text for text in heavy_texts.german(0, [tmp_path]) if "Vogel" in text or "bird" in text
    ]
    assert found == ["Der Hund und die Katze sind nicht mit dem Vogel auf der Wiese."]
