"""Sections about what stored forms keep at each rate, ours and others', by base and family of experts."""

from typing import Any

from sections.markdown import load, table

Row = dict[str, Any]
OURS = "ours"


def rates() -> str:
    """A table for each base: bits per parameter and the gain kept, the means over each family's experts."""
    return "\n\n".join(f"### {base}\n\n{_table(rows)}" for base, rows in by("base").items())


def ahead() -> str:
    """The rows in which a peer keeps more than our form does in as many bits or fewer, and our lowest figures."""
    points = []
    for base, rows in by("base").items():
        for family, of_family in _by("family", rows).items():
            means = _means(of_family)
            own = [mean for form, mean in means.items() if form.startswith(OURS)]
            for form, (bits, kept, _) in means.items():
                best = max((k for b, k, _ in own if b <= bits), default=0.0)
                if not form.startswith(OURS) and kept > best:
                    points.append(
                        f"- {base}, {family}: `{form}` keeps {100 * kept:.2f} in {bits:.2f} bits, "
                        f"ours {100 * best:.2f} in as many or fewer."
                    )
    return "\n".join(points) or "- No peer keeps more in as many bits as one of our rates takes."


def settings() -> str:
    """Our form as it is and with other settings: the gain kept by every expert at each rate."""
    rows = load("rate-settings")["rows"]
    usual = {(*_expert(r), r["form"]): r for r in load("rates")["rows"]}
    labels = list(dict.fromkeys(r["form"].split(", ", 1)[1] for r in rows))
    lines = []
    for (base, family, expert), own in _by_expert(rows).items():
        for rate in dict.fromkeys(r["form"].split(", ")[0] for r in own):
            kept = {r["form"].split(", ", 1)[1]: r["gain_kept"] for r in own if _is(r, rate)}
            default = usual[base, family, expert, rate]["gain_kept"]
            cells = [f"{100 * x:.2f}" for x in (default, *(kept[label] for label in labels))]
            lines.append([f"{base}, {family}: {expert}", rate.removeprefix("ours "), *cells])
    return table(["expert", "bits", "as it is", *labels], lines)


def _is(row: Row, rate: str) -> bool:
    return row["form"].startswith(f"{rate}, ")


def by(key: str) -> dict[str, list[Row]]:
    """The rows of results/rates.json, grouped."""
    return _by(key, load("rates")["rows"])


def _by(key: str, rows: list[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def _expert(row: Row) -> tuple[str, str, str]:
    return row["base"], row["family"], row["expert"]


def _by_expert(rows: list[Row]) -> dict[tuple[str, str, str], list[Row]]:
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault(_expert(row), []).append(row)
    return groups


def _means(rows: list[Row]) -> dict[str, tuple[float, float, int]]:
    """By form: bits per parameter and gain kept, means over experts, and the number of experts."""
    means = {}
    for form, own in _by("form", rows).items():
        bits = sum(row["bits_per_parameter"] for row in own) / len(own)
        kept = sum(row["gain_kept"] for row in own) / len(own)
        means[form] = (bits, kept, len(own))
    return means


def _table(rows: list[Row]) -> str:
    families = {family: _means(own) for family, own in _by("family", rows).items()}
    head = ["form"]
    for family, means in families.items():
        count = max(number for *_, number in means.values())
        head += [f"{family} ({count}): bits", "gain kept, %"]
    lines = []
    for form in dict.fromkeys(row["form"] for row in rows):
        line = [f"`{form}`"]
        for means in families.values():
            bits, kept, _ = means.get(form, (None, None, 0))
            line += ["", ""] if bits is None else [f"{bits:.2f}", f"{100 * kept:.2f}"]
        lines.append(line)
    return table(head, lines)
