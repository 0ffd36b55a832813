"""The pictures of results/rates.json, one a base: the gain lost against bits per parameter, ours and others'.

python benchmarks/rates_plot.py
"""

from __future__ import annotations

import re
from typing import Any

import record
from matplotlib.figure import Figure
from sections.rates import OURS, by

LEAST = 1e-4  # what rows resolve; less is drawn there
_RATE = re.compile(r"[ ,]*(rank |bits )?[\d.]+$")


def main() -> None:
    for base, rows in by("base").items():
        families = list(dict.fromkeys(row["family"] for row in rows))
        figure = Figure(figsize=(4.4 * len(families), 3.6), layout="constrained")
        panels = figure.subplots(1, len(families), squeeze=False, sharey=True)[0]
        kinds = list(dict.fromkeys(kind_of(row["form"]) for row in rows))
        shown: dict[str, Any] = {}
        for axes, family in zip(panels, families, strict=True):
            lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
            for row in (row for row in rows if row["family"] == family):
                point = (row["bits_per_parameter"], row["gain_kept"])
                lines.setdefault(kind_of(row["form"]), {}).setdefault(row["form"], []).append(point)
            for kind, forms in lines.items():
                points = sorted(
                    tuple(sum(x) / len(x) for x in zip(*of_form, strict=True))
                    for of_form in forms.values()
                )
                bits = [b for b, _ in points]
                lost = [100 * max(LEAST, 1 - kept) for _, kept in points]
                own = kind.startswith(OURS)
                (shown[kind],) = axes.plot(
                    bits,
                    lost,
                    color=f"C{kinds.index(kind)}",  # the same in every panel
                    linewidth=2.2 if own else 1,
                    linestyle="-" if own else "--",
                    marker="o",
                    markersize=4,
                )
            axes.set(title=family, xscale="log", yscale="log", xlabel="bits per parameter")
        panels[0].set_ylabel("gain lost, %")
        figure.legend(
            [shown[kind] for kind in kinds],
            kinds,
            loc="outside lower center",
            ncols=len(kinds),
            fontsize=8,
        )
        figure.savefig(record.RESULTS / f"{picture(base)}.png", dpi=110)


def kind_of(form: str) -> str:
    """A form's name without its rate."""
    return "one and two bits" if form in ("one bit", "two bits") else _RATE.sub("", form)


def picture(base: str) -> str:
    """The name of a base's picture, without its ending."""
    return "rates-" + re.sub(r"[^a-z0-9]+", "-", base.lower())


if __name__ == "__main__":
    main()
