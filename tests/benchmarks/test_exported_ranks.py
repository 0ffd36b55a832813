"""The rows of exported ranks: what all adapters of a family keep, at each rank and at those that `auto` chooses."""

import exported_ranks
import pytest
import rank_errors
import record
import torch
from transformers import AutoModelForCausalLM

from mergekit_mediator.delta.kept import lost_of_left_out
from mergekit_mediator.evaluate.rivals import Rivals
from mergekit_mediator.export.rank import AUTO_KEEP

PROMPTS = {"math": [[1, 5, 6, 7], [1, 5, 9]], "code": [[1, 9, 4], [1, 9, 3, 3]]}


def answers(expert, prompts):
    """The expert's own answers, so that it has something to keep."""
    model = AutoModelForCausalLM.from_pretrained(expert, dtype=torch.float32)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    return [
        (p, model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist()) for p in prompts
    ]


@pytest.fixture(scope="module")
def rows(family, tmp_path_factory):
    work = tmp_path_factory.mktemp("ranks")
    experts = {name: str(family.experts[name]) for name in PROMPTS}
    pairs = {name: answers(experts[name], prompts) for name, prompts in PROMPTS.items()}
    made = Rivals(str(family.base), experts, work / "merges")
    ranks = {"base": [4], "mean": [4]}
    return list(exported_ranks.rows(made, pairs, ranks, [4], "pico", {"bits": 8.0}, work))


def test_every_rank_is_measured_with_the_norms_that_a_server_can_have(rows):
    asked = [4, *exported_ranks.AUTO]
    expected = [("base", a, norms) for a in asked for norms in ("dense", "mean", "own")]
    expected += [("mean", 4, norms) for norms in ("dense", "own")]
    assert [(r["reference"], r["auto"] or r["rank"], r["norms"]) for r in rows] == expected
    assert all(row["worst_gain_kept"] <= row["gain_kept"] for row in rows)


def test_an_adapter_of_full_rank_with_the_expert_s_norms_is_the_stored_expert(rows):
    for row in rows:
        if row["norms"] == "own" and row["worst_squared_error"] < 1e-6:
            assert row["gain_kept"] == pytest.approx(1, abs=0.05)  # losses are in bfloat16
            assert row["answers_kept"] == 1
    assert any(row["worst_squared_error"] < 1e-6 for row in rows)


def test_extraction_of_a_rank_stands_beside_the_adapters_of_that_rank(rows):
    for row in rows:
        is_beside = row["rank"] == 4 and row["auto"] is None
        assert (row["extract_lora_gain_kept"] is not None) == is_beside
        assert ("extract_lora_no_norms_gain_kept" in row) == is_beside


def test_auto_never_takes_less_for_more(rows):
    ranks = [row["rank"] for row in rows if row["auto"] and row["norms"] == "own"]
    assert len(ranks) == len(exported_ranks.AUTO)
    assert ranks == sorted(ranks)
    assert all(set(row["ranks"]) == set(PROMPTS) for row in rows)


def test_adapters_that_are_predicted_to_keep_the_default_part_kept_nearly_all():
    def least(figure, part):
        rows = record.read("serving")["exported"]
        return min(
            row[figure]
            for row in rows
            if 1 - lost_of_left_out(row["worst_squared_error"], 0) >= part
            and row.get("norms") != "own"
        )

    assert least("gain_kept", AUTO_KEEP) >= 0.998
    assert least("answers_kept", 0.9999) == 1 > least("answers_kept", AUTO_KEEP) >= 0.97


def test_no_adapter_of_what_is_stored_is_nearer_than_the_best_of_its_rank():
    generator = torch.Generator().manual_seed(0)
    shapes = [(96, 80), (80, 120)]
    base = {f"m{i}": torch.randn(*s, generator=generator).bfloat16() for i, s in enumerate(shapes)}
    taus = {n: 0.01 * torch.randn(*w.shape, generator=generator) for n, w in base.items()}
    rows = rank_errors.rows(base, taus)
    assert [row["bits"] for row in rows] == list(rank_errors.BITS)
    for row in rows:
        for rank in rank_errors.RANKS:
            assert 0 < row[f"best_{rank}"] <= row[f"adapter_{rank}"] < 1
    assert rows[0]["stored"] > rows[-1]["stored"]
