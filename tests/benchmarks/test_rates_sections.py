"""The page about rates says where peers are ahead."""

import pytest
import rates_plot
from sections import rates


def row(form, bits, kept, left, **changes):
    figures = {"bits_per_parameter": bits, "gain_kept": kept, "left_out": left}
    return {"base": "B", "family": "F", "expert": "E", "form": form, **figures, **changes}


@pytest.fixture
def rows(monkeypatch):
    rows = [row("ours 0.5", 0.5, 0.98, 0.3), row("ours 1", 1.0, 0.99, 0.1)]
    monkeypatch.setattr(rates, "load", lambda name: {"rows": rows})
    return rows


def test_a_peer_that_keeps_more_in_as_many_bits_is_named(rows):
    rows.append(row("one bit", 1.0, 0.995, 0.2))
    assert rates.ahead() == "- B, F: `one bit`, 1.00 bits, keeps 99.50, ours 99.00."


def test_a_peer_that_leaves_out_less_in_fewer_bits_is_named(rows):
    rows.append(row("ternary 0.1", 0.9, 0.5, 0.25))
    assert rates.ahead() == "- B, F: `ternary 0.1`, 0.90 bits, leaves out 25.0, ours 30.0."


def test_a_rate_of_hardly_more_bits_is_as_many(rows):
    rows += [row("ours 2", 2.02, 1.0, 0.05), row("two bits", 2.0, 0.995, 0.06)]
    assert rates.ahead() == "- None of the peers, at none of the rates."


def test_a_peer_that_takes_more_bits_for_as_much_is_not_named(rows):
    rows += [row("two bits", 2.0, 0.99, 0.1), row("extract-lora 4", 0.1, 1.0, 0.0)]
    assert rates.ahead() == "- None of the peers, at none of the rates."


def test_a_table_has_the_means_of_the_experts_of_each_family(rows):
    rows += [row("ours 1", 1.2, 0.97, 0.3, expert="D"), row("ours 1", 1.1, 1.0, 0.0, family="G")]
    tables = rates.rates()
    assert "| F (2) | bits | gain kept, % | change left out, % |" in tables
    assert "| `ours 1` | 1.10 | 98.00 | 20.0 |" in tables
    assert "| `ours 0.5` | 0.50 | 98.00 | 30.0 |" in tables
    assert "| G (1) | bits |" in tables


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ("ours 0.05", "ours"),
        ("extract-lora 16", "extract-lora"),
        ("one bit", "one and two bits"),
        ("two bits", "one and two bits"),
        ("8-3-2 bits 0.5", "8-3-2"),
        ("sign first, rank 4", "sign first"),
        ("ternary 0.2", "ternary"),
    ],
)
def test_a_line_of_the_picture_joins_the_rates_of_one_form(form, kind):
    assert rates_plot.kind_of(form) == kind
