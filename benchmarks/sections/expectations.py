"""What users may expect: the gain that each kind of fine-tune keeps at each rate, from the results of other pages."""

from collections.abc import Iterable, Mapping
from statistics import mean
from typing import Any

from sections.markdown import load, table

RANKS = (4, 16, 64, 256)  # of adapters
RATES = (0.05, 0.08, 0.15, 0.25, 0.5, 1.0, 2.0)
PARAMETERS = 7e9  # of the model that a reader has in mind
_NEAR = 1.15  # a rate counts as one of the columns if it is within this factor


def expectations() -> str:
    """One row for each kind of fine-tune, with the gain kept at each number of bits per parameter."""
    rows = [[kind, *(_cell(kept, bits) for bits in RATES)] for kind, kept in _kinds()]
    head = ["kind of fine-tune", *(f"{bits:g} bits" for bits in RATES)]
    sizes = [f"{PARAMETERS * bits / 8 / 1e9:.2g} GB" for bits in RATES]
    return table(head, [*rows, ["an expert of a 7B model", *sizes]])


def adapters() -> str:
    """One row for each kind of fine-tune, with the gain that an adapter of each rank keeps of it."""
    rates = [row for row in load("rates")["rows"] if row["base"].startswith("SmolLM2")]
    kinds = {
        "full fine-tunes, one narrow task each": [r for r in rates if r["family"] == "strong"],
        "the same, of which a seventh of the numbers changed": [
            r for r in rates if r["family"] == "sparse"
        ],
        "narrow tasks, training stopped early": [r for r in rates if r["family"] == "weak"],
        "Python source, 0.10 million tokens": [r for r in rates if r["family"] == "broad"],
        "Python source, 18.6 million tokens": _heavy(),
    }
    rows = []
    for kind, measured in kinds.items():
        kept = _by_bits(_ours(measured, "extract-lora"))
        rows.append([kind, *(f"{100 * kept[rank]:.1f}" if rank in kept else "" for rank in RANKS)])
    return table(["kind of fine-tune", *(f"rank {rank}" for rank in RANKS)], rows)


def _heavy() -> list[Mapping[str, Any]]:
    """The rows of the fine-tune of most tokens."""
    return [row for row in load("heavy")["rows"] if row["expert"] == "python"]


def _kinds() -> list[tuple[str, Mapping[float, float]]]:
    codec, rates = load("codec")["rows"], load("rates")["rows"]
    kept = {
        family: _by_bits(r for r in codec if r["family"] == family and r["codec"][:4] == "bits")
        for family in ("adapters", "strong", "weak")
    }
    gemma = _by_bits(_ours(r for r in rates if r["base"].startswith("Gemma")))
    broad = [row for row in rates if row["family"] == "broad"]
    weak = [row for row in rates if row["family"] == "weak"]
    return [
        ("LoRA adapters, one narrow task each", kept["adapters"]),
        ("full fine-tunes, one narrow task each", kept["strong"]),
        ("one of those, of Gemma 3 270M, over the base", gemma),
        ("narrow tasks, training stopped early", kept["weak"]),
        ("others of these, over the base", _by_bits(_ours(weak))),
        ("the same, as random signs", _by_bits(_ours(weak, "ours as signs"))),
        ("Python source, 0.10 million tokens", _by_bits(_ours(broad))),
        ("the same, as random signs", _by_bits(_ours(broad, "ours as signs"))),
        ("Python source, 18.6 million tokens", _by_bits(_ours(_heavy()))),
    ]


def _ours(rows: Iterable[Mapping[str, Any]], form: str = "ours") -> list[Mapping[str, Any]]:
    return [row for row in rows if row["form"].rsplit(" ", 1)[0] == form]


def _by_bits(rows: Iterable[Mapping[str, Any]]) -> dict[float, float]:
    """The gain kept by the bits per parameter, the mean of experts at the same rate."""
    found: dict[float, list[float]] = {}
    for row in rows:
        rate = float((row.get("codec") or row["form"]).split()[-1])
        found.setdefault(rate, []).append(row.get("loss_recovered", row.get("gain_kept")))
    return {rate: mean(parts) for rate, parts in found.items()}


def _cell(kept: Mapping[float, float], bits: float) -> str:
    near = [rate for rate in kept if bits / _NEAR <= rate <= bits * _NEAR]
    return f"{100 * kept[near[0]]:.1f}" if near else ""
