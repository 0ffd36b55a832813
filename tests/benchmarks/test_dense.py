"""The rows of dense experts: new ones take the place of old ones, and the page shows all."""

import dense
import record
from sections import merging

FIGURES = {
    **{f"{part}_{figure}": 99.0 for part in dense.PARTS for figure in ("mean", "worst")},
    **{f"{part}_recovered": 99.5 for part in dense.PARTS},
    **{"bytes_over_base": 1.02, "routing_accuracy": 1.0, "bits_per_parameter": 0.08},
}
ABOUT = {"experts": 4, "prompts_per_task": 64, "asked": 16}


def row(reference, budget, **changes):
    return {"dense": reference, "budget": budget, "merge_cpu_seconds": 1.0, **FIGURES, **changes}


def test_rows_of_the_same_family_dense_expert_and_budget_are_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    dense.write("strong4", [row("mean", "1.02x"), row("wudi", "1.02x")], ABOUT)
    dense.write("strong4", [row("wudi", "1.02x", dense_mean=70.0)], ABOUT)
    dense.write("eight", [row("wudi", "1.02x")], {**ABOUT, "experts": 8})
    content = record.read("dense")
    assert [(r["family"], r["dense"], r["dense_mean"]) for r in content["rows"]] == [
        ("strong4", "mean", 99.0),
        ("strong4", "wudi", 70.0),
        ("eight", "wudi", 99.0),
    ]
    monkeypatch.setattr(merging, "load", record.read)
    table = merging.dense()
    assert "| strong4 | `wudi` | `1.02x` | 1.020 | 70.0 (99.0) | 99.0 (99.0) |" in table
    assert "`eight`: 8 experts, 64 held-out prompts a task, 16 others" in table


def test_a_part_that_is_kept_is_asked_for_in_place_of_a_budget():
    assert dense.storage("1.02x") == {"budget": "1.02x"}
    assert dense.storage("keep 0.99") == {"keep": 0.99}


def test_the_readme_tells_of_the_smallest_artifact_of_each_family(monkeypatch):
    small = row("regmean_pp", "keep 0.99", bytes_over_base=1.002, routed_mean=100.4)
    rows = [
        {"family": family, **r}
        for family in ("strong4", "eight")
        for r in (row("regmean_pp", "1.02x"), small)
    ]
    families = {"strong4": ABOUT, "eight": {**ABOUT, "experts": 8}}
    monkeypatch.setattr(merging, "load", lambda _: {"rows": rows, "families": families})
    told = merging.dense_kept()
    assert told.startswith(
        "With 16 prompts of each task and `reference: regmean_pp`, four of these"
    )
    assert "eight tasks kept 100.4% (99.0% of the worst) in 1.002x, the dense expert alone" in told
