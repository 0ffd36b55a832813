"""Sections about the merge methods of the literature: what they keep, and what they cost."""

import shlex
from typing import Any

from sections.markdown import load, script, table

_OF_METHOD = "--method"  # the option of a command that may come many times


def costs() -> str:
    """Time and memory of all methods beside `ties`: the data-free ones, and those with prompts."""
    figures = load("methods")
    parts = []
    asked = max((row.get("asked", 0) for row in figures["rows"]), default=0)
    for family in ("random", "strong4, asked"):
        rows = [
            [
                f"`{row['method']}`",
                f"{row['time_over_ties']:.2f}",
                f"{row['peak_memory_over_ties']:.2f}",
            ]
            for row in figures["rows"]
            if row["family"] == family
        ]
        parts.append(table(["", "processor time / `ties`", "peak memory / `ties`"], rows))
    about = f"{figures['experts']} experts, {figures['threads']} thread."
    return "\n\n".join(
        [parts[0], f"{about} With {asked} prompts of each of four trained experts:", parts[1]]
    )


def summary() -> str:
    """What each method keeps of every family, the mean and the worst; first those that are first most often."""
    figures = load("methods")
    families = list(figures["quality"])
    kept: dict[str, dict[str, dict[str, Any]]] = {}
    for row in figures["rows"]:
        if row["family"] in families:
            kept.setdefault(row["method"], {})[row["family"]] = row
    ranks = {method: _rank(figures["rows"], of_family) for method, of_family in kept.items()}
    rows = [
        [
            f"`{method}`",
            *(
                f"{row['normalized_mean']:.1f} ({row['normalized_worst']:.1f})" if row else ""
                for row in map(kept[method].get, families)
            ),
        ]
        for method in sorted(kept, key=lambda method: ranks[method])
    ]
    return table(["mean (worst), %", *families], rows)


def random_signs(family: str) -> str:
    """Whole merges with signs at random places, beside a budget and the best static merges of the same experts."""
    figures = load("methods")
    own = [row for row in figures["rows"] if row["family"] == family]
    static = sorted(
        (row for row in own if "dense_mean" not in row), key=lambda row: -row["normalized_mean"]
    )
    stored = [row for row in own if row["method"].startswith("mediator")]
    rows = [
        [
            f"`{row['coefficients']}`" if row in stored else f"`{row['method']}`",
            f"{row['normalized_mean']:.1f} ({row['normalized_worst']:.1f})",
            f"{row.get('bytes_over_base', 1):.3f}",
            f"{row['merge_cpu_seconds']:.0f}",
        ]
        for row in [*stored, *static[:2], *(row for row in static[2:] if row["method"] == "ties")]
    ]
    head = ["", "kept, %", "bytes / one model", "merge, CPU s"]
    return f"{table(head, rows)}\n\n{_measured_on(family, figures['quality'][family])}"


def _rank(rows: list[dict[str, Any]], own: dict[str, dict[str, Any]]) -> float:
    """The part of the other methods that are ahead of a method, the mean over the families that have it."""
    shares = []
    for family, row in own.items():
        others = [other["normalized_mean"] for other in rows if other["family"] == family]
        shares.append(sum(mean > row["normalized_mean"] for mean in others) / len(others))
    return sum(shares) / len(shares)


def quality() -> str:
    """What each method keeps of the experts' skills, best first, under a heading for each family."""
    figures = load("methods")
    parts = []
    for family, how in figures["quality"].items():
        own = [row for row in figures["rows"] if row["family"] == family]
        rows = [
            [
                f"`{row['method']}`",
                f"{row['normalized_mean']:.1f}",
                f"{row['normalized_worst']:.1f}",
                f"`{row['coefficients']}`" if row["coefficients"] else "",
                str(row["tried"]),
                f"{row['time_over_ties']:.1f}",
                f"{row.get('bytes_over_base', 1):.2f}",
            ]
            for row in sorted(own, key=lambda row: -row["normalized_mean"])
        ]
        head = ["", "mean, %", "worst, %", "best coefficients", "tried", "processor time / `ties`"]
        head.append("bytes / one model")
        runs = [*reversed(how.get("earlier", [])), how]
        commands = "\n".join(f"- Command: `{c}`" for c in _commands([r["command"] for r in runs]))
        about = _measured_on(family, how)
        parts.append(f"## `{family}`\n\n{about}\n\n{table(head, rows)}\n\n{commands}")
    return "\n\n".join(parts)


def _commands(recorded: list[str]) -> list[str]:
    """Recorded commands; those that differ in their methods only become one, with all of these."""
    methods: dict[str, list[str]] = {}
    for command in recorded:
        words = iter(shlex.split(script(command)))
        others: list[str] = []
        asked: list[str] = []
        for word in words:
            if word == _OF_METHOD:
                asked.append(next(words))
            else:
                others.append(word)
        methods.setdefault(shlex.join(others), []).extend(asked)
    return [
        " ".join([others, *(f"{_OF_METHOD} {shlex.quote(m)}" for m in dict.fromkeys(asked))])
        for others, asked in methods.items()
    ]


def _measured_on(family: str, how: dict[str, Any]) -> str:
    """The experts of a table on merge methods, and what was asked of them."""
    seeds = ", ".join(f"{name} {seed}" for name, seed in how["seeds"].items())
    asked = f"{how['prompts_of_methods']} others again for methods with prompts. Seeds: {seeds}."
    if "rows_per_expert" in how:
        tokens = sorted(count / 1e6 for count in how["tokens_of_experts"])
        return (
            f"{how['experts']} experts (`{family}`) of {tokens[0]:.2f} to {tokens[-1]:.2f} million tokens, "
            f"{how['rows_per_expert']} rows of held-out text an expert, {how['tuning_rows_per_expert']} other rows to "
            f"choose coefficients, {asked}"
        )
    return (
        f"{how['experts']} experts (`{family}`), {how['prompts_per_task']} prompts a task, "
        f"{how['tuning_prompts_per_task']} others a task to choose coefficients, {asked}"
    )
