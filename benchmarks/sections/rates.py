"""Sections about what stored forms keep at each rate, ours and others', by base and family of experts."""

from typing import Any, NamedTuple

from sections.markdown import load, table

Row = dict[str, Any]
OURS = "ours"
_AS_MANY = 1.02  # times the bits: no two forms take exactly as many


def rates() -> str:
    """Tables for each base and family: bits per parameter and the gain kept, the means over the family's experts."""
    return "\n\n".join(f"### {base}\n\n{_tables(rows)}" for base, rows in by("base").items())


def heavy_changes(name: str = "heavy") -> str:
    """What heavy fine-tunes changed, to compare with one's own."""
    rows = {row["expert"]: row for row in load(name)["rows"]}
    head = ["expert", "tokens, millions", "norm over the base's", "mean change of a weight"]
    head += ["weights changed, %", "ranks that hold 90% of a matrix, %"]
    lines = [
        [
            expert,
            f"{row['tokens'] / 1e6:.1f}",
            f"{row['norm_over_base']:.4f}",
            f"{row['mean_change']:.5f}",
            f"{100 * row['changed_share']:.0f}",
            f"{100 * row['rank_share_of_90']:.0f}",
        ]
        for expert, row in rows.items()
    ]
    return table(head, lines)


def heavy(name: str = "heavy") -> str:
    """What each form keeps of heavy fine-tunes."""
    rows = load(name)["rows"]
    head = ["expert", "form", "bits", "gain kept, %", "change left out, %"]
    return table(
        head,
        [
            [
                row["expert"],
                f"`{row['form']}`",
                f"{row['bits_per_parameter']:.2f}",
                f"{100 * row['gain_kept']:.1f}",
                f"{100 * row['left_out']:.1f}",
            ]
            for row in rows
        ],
    )


def settings() -> str:
    """What our form keeps with other settings, on narrow and on broad fine-tunes."""
    head = ["family", "expert", "form", "bits", "gain kept, %", "change left out, %"]
    lines = [
        [
            row["family"],
            row["expert"],
            f"`{row['form']}`",
            f"{row['bits_per_parameter']:.2f}",
            f"{100 * row['gain_kept']:.2f}",
            f"{100 * row['left_out']:.1f}",
        ]
        for row in sorted(
            load("settings")["rows"], key=lambda r: (r["family"], r["expert"], r["form"])
        )
    ]
    return table(head, lines)


def ahead(name: str = "rates") -> str:
    """The forms of peers that keep more than ours in as many bits or fewer, or leave out less of the change."""
    points = []
    for base, rows in by("base", name).items():
        for family, of_family in _by("family", rows).items():
            means = _means(of_family)
            own = [mean for form, mean in means.items() if form.startswith(OURS)]
            for form, peer in means.items():
                rivals = (
                    []
                    if form.startswith(OURS)
                    else [m for m in own if m.bits <= _AS_MANY * peer.bits]
                )
                kept = max((m.kept for m in rivals), default=1.0)
                left = min((m.left for m in rivals), default=0.0)
                where = f"- {base}, {family}: `{form}`, {peer.bits:.2f} bits,"
                if peer.kept > kept:
                    points.append(f"{where} keeps {100 * peer.kept:.2f}, ours {100 * kept:.2f}.")
                if peer.left < left:
                    points.append(
                        f"{where} leaves out {100 * peer.left:.1f}, ours {100 * left:.1f}."
                    )
    return "\n".join(points) or "- None of the peers, at none of the rates."


def weighed_errors() -> str:
    """What our form keeps with squared error weighed by second moments, beside plain squared error."""
    head = ["base", "expert", "error weighed by", "bits", "gain kept, %", "change left out, %"]
    rows = [
        [
            row["base"],
            row["expert"],
            row["form"].rsplit(",", 1)[0],
            f"{row['bits_per_parameter']:.3f}",
            f"{100 * row['gain_kept']:.2f}",
            f"{100 * row['left_out']:.1f}",
        ]
        for row in load("weighed-errors")["rows"]
    ]
    return table(head, rows)


def by(key: str, name: str = "rates") -> dict[str, list[Row]]:
    """The rows of results/NAME.json, grouped."""
    return _by(key, load(name)["rows"])


def _by(key: str, rows: list[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


class Mean(NamedTuple):
    """Of a form, over the experts that it was measured on: bits per parameter, gain kept, change left out."""

    bits: float
    kept: float
    left: float
    experts: int


def _means(rows: list[Row]) -> dict[str, Mean]:
    means = {}
    for form, own in _by("form", rows).items():
        bits, kept, left = (
            sum(row[figure] for row in own) / len(own)
            for figure in ("bits_per_parameter", "gain_kept", "left_out")
        )
        means[form] = Mean(bits, kept, left, len(own))
    return means


def _tables(rows: list[Row]) -> str:
    """A table for each family of experts."""
    return "\n\n".join(_table(family, _means(own)) for family, own in _by("family", rows).items())


def _table(family: str, means: dict[str, Mean]) -> str:
    count = max(mean.experts for mean in means.values())
    head = [f"{family} ({count})", "bits", "gain kept, %", "change left out, %"]
    lines = [
        [f"`{form}`", f"{mean.bits:.2f}", f"{100 * mean.kept:.2f}", f"{100 * mean.left:.1f}"]
        for form, mean in means.items()
    ]
    return table(head, lines)
