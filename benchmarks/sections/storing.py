"""Sections about stored experts: what each form costs and keeps."""

from typing import Any

from mergekit_mediator.delta.kept import kept_in_noise
from sections.markdown import load, table

# Of the rows of codec.json, enough to see the curves.
FORMS = {
    *("bits: 0.05", "bits: 0.08", "bits: 0.15", "bits: 0.2", "bits: 0.5", "bits: 1"),
    *("extract-lora 1", "extract-lora 4", "extract-lora 16"),
    *("adapter", "exact 0.1", "sign 1"),
}


def codec() -> str:
    """One row for each form and family, by bytes."""
    rows = [
        [
            f"`{row['codec']}`",
            row["family"],
            f"{row['bits_per_parameter']:.3f}",
            f"{row['bytes_per_expert'] / 1e6:.1f}",
            f"{row['relative_error']:.2f}",
            f"{row['answer_log_likelihood']:.3f}",
            f"{100 * row['loss_recovered']:.1f}",
            f"{100 * row['accuracy_over_expert']:.1f}",
        ]
        for row in sorted(
            load("codec")["rows"], key=lambda r: (r["family"], r["bits_per_parameter"])
        )
        if row["codec"] in FORMS
    ]
    head = ["stored as", "experts", "bits per parameter", "MB", "squared error", "nats / token"]
    return table([*head, "loss recovered, %", "accuracy / expert, %"], rows)


def lossless() -> str:
    """Exact values: bytes and speed beside general compressors."""
    figures = load("lossless")
    rows = [
        [
            f"`{row['codec']}`" if row["codec"].startswith("exact") else row["codec"],
            f"{row['bits_per_parameter']:.2f}",
            *(
                f"{row[key]:.0f}" if row.get(key) is not None else ""
                for key in ("encode_million_per_second", "decode_million_per_second")
            ),
        ]
        for row in figures["rows"]
    ]
    head = ["", "bits per parameter", "encoded, million / s", "decoded, million / s"]
    absent = [tool for tool, version in figures["tools"].items() if version == "not installed"]
    return f"{table(head, rows)}\n\nNot compared, since not installed: {', '.join(absent)}."


def keep(values: str = "") -> str:
    """The predicted and the measured part of its gain that each expert keeps, and how far they are apart."""
    figures = [row for row in load("keep")["rows"] if row["values"] == values]
    over_base = any("over_base" in row for row in figures)
    rows = [
        [
            row["expert"],
            row["family"],
            f"{row['keep']:g}",
            f"{row['predicted']:.4f}",
            f"{row['measured']:.4f}",
            *([f"{row['over_base']:.4f}"] if over_base else []),
            f"{row['bits_per_parameter']:.3f}",
        ]
        for row in figures
    ]
    head = ["expert", "experts", "`keep`", "predicted", "measured"]
    head += ["over the base"] * over_base + ["bits per parameter"]
    lines = [table(head, rows), ""]
    for part in sorted({row["keep"] for row in figures}):
        of_part = [row for row in figures if row["keep"] == part]
        told = [_errors(of_part, "measured", "measured")]
        told += [_errors(of_part, "over_base", "over the base")] if over_base else []
        lines.append(f"- `keep: {part:g}`: {'; '.join(told)}.")
    return "\n".join(lines)


def _errors(rows: list[dict[str, Any]], figure: str, name: str) -> str:
    """How far figures are from the predicted ones."""
    errors = [row[figure] - row["predicted"] for row in rows]
    near = sum(abs(error) <= 0.01 for error in errors)
    return (
        f"{name} less predicted is {100 * min(errors):+.1f} to {100 * max(errors):+.1f} points, within one point for "
        f"{near} of {len(errors)} experts"
    )


def own_texts() -> str:
    """What an expert's own texts tell of its stored form, beside its weights and what is held out."""
    head = ["family", "expert", "stored", "bits", "by weights", "by its own texts"]
    columns = ("predicted", "kept_own", "kept_held_out", "gain_kept")
    rows = [
        [
            row["family"],
            row["expert"],
            f"`{row['form']}`",
            f"{row['bits_per_parameter']:.2f}",
            *("" if row.get(key) is None else f"{row[key]:.3f}" for key in columns),
        ]
        for row in load("own-texts")["rows"]
    ]
    return table([*head, "by held-out ones", "gain kept"], rows)


def noise() -> str:
    """The gain that broad fine-tunes keep beside noise, predicted and measured."""
    rows = [
        [
            row["expert"],
            f"{row['bits_per_parameter']:.2f}",
            f"{row['left_out']:.1f}",
            f"{100 * float(kept_in_noise(row['left_out'], row['norm_over_base'] ** 2)):.1f}",
            f"{100 * row['gain_kept']:.1f}",
        ]
        for row in load("broad")["rows"]
        if row["form"].startswith("random signs")
    ]
    head = ["expert", "bits", "noise over the change", "predicted, %", "measured, %"]
    return table(head, rows)


def signs_as_adapters() -> str:
    """What adapters keep of stored experts, by form: of the rank that `auto` chose, and of others."""
    by_expert: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for row in load("signs-as-adapters")["rows"]:
        rank = "auto" if row["auto"] else str(row["rank"])
        by_expert.setdefault((row["expert"], row["values"]), {})[rank] = row
    ranks = list(next(iter(by_expert.values())))
    rows = [
        [
            expert,
            f"`{form}`",
            str(of_rank["auto"]["rank"]),
            *(f"{100 * of_rank[rank]['gain_kept']:.1f}" for rank in ranks),
        ]
        for (expert, form), of_rank in sorted(by_expert.items())
    ]
    kept = [f"{'auto' if rank == 'auto' else f'rank {rank}'}, %" for rank in ranks]
    return table(["expert", "stored as", "rank by `auto`", *kept], rows)


def other_texts() -> str:
    """What texts of other kinds lose by each expert and by its stored forms, in nats per token beside the base."""
    lost: dict[tuple[str, str, float], dict[str, float]] = {}
    for row in load("other-texts")["rows"]:
        key = (row["expert"], row["form"], row["bits_per_parameter"])
        lost.setdefault(key, {})[row["text"]] = row["nats"] - row["base_nats"]
    texts = sorted({text for by_text in lost.values() for text in by_text})
    rows = [
        [
            expert,
            f"`{form}`" if form != "exact" else form,
            f"{bits:.2f}",
            *(f"{by_text[text]:+.3f}" if text in by_text else "" for text in texts),
        ]
        for (expert, form, bits), by_text in lost.items()
    ]
    return table(["expert", "form", "bits", *texts], rows)
