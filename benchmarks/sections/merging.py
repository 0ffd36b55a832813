"""Sections about merges: the demo's, what a merge costs, and many experts."""

from sections.markdown import load, table

# Families of results/dense.json that README.md tells of.
_COUNTED = {"strong4": "four of these tasks", "eight": "eight tasks"}


def demo() -> str:
    """Systems against skills, and the sizes."""
    figures = load("demo")
    skills = list(figures["routing"])
    rows = []
    for system, scores in figures["systems"].items():
        values = [100 * scores[skill]["accuracy"] for skill in skills]
        rows.append([system, *[f"{v:.0f}" for v in values], f"{sum(values) / len(values):.1f}"])
    sizes = figures["sizes"]
    right = sum(entry["chosen"][skill] for skill, entry in figures["routing"].items())
    asked = sum(sum(entry["chosen"].values()) for entry in figures["routing"].values())
    experts = ", ".join(f"{e['name']} {e['bytes'] / 1e6:.1f} MB" for e in sizes["experts"])
    return "\n".join(
        [
            table(["exact match, %", *skills, "mean"], rows),
            "",
            f"{asked // len(skills)} held-out prompts per skill. {right} of {asked} prompts are routed "
            f"to their own expert, without any calibration data. The stored experts take: {experts}. "
            f"Everything together takes {sizes['total_over_dense']:.3f} of one model "
            f"({sizes['dense_bytes'] / 1e6:.0f} MB). The run took {figures['seconds']} seconds.",
        ]
    )


def merge_cost() -> str:
    """Processor time and memory of a merge beside mergekit's own methods and extractions."""
    figures = load("merge-cost")
    rows = [
        [
            f"`{name}`" if name != figures["extraction"] else name,
            f"{row['cpu_seconds']:.0f}",
            f"{row['cpu_over_linear']:.2f}",
            f"{row['cpu_over_extraction']:.2f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
        ]
        for name, row in figures["rows"].items()
    ]
    head = ["", "processor time, s", "/ `linear`", "/ extraction", "peak memory, GB"]
    runs = "one run" if figures["runs"] == 1 else f"the median of {figures['runs']} runs"
    return (
        f"{table(head, rows)}\n\n{figures['experts']} experts, density {figures['density']} for "
        f"`ties` and for `route`, {runs}."
    )


def dense() -> str:
    """Dense experts, and what experts add to them, within the same budgets."""
    figures = load("dense")
    parts = ("dense", "own", "routed")
    rows = [
        [
            row["family"],
            f"`{row['dense']}`",
            f"`{row['budget'].replace('keep ', 'keep: ')}`",
            f"{row['bytes_over_base']:.3f}",
            *(f"{row[f'{part}_mean']:.1f} ({row[f'{part}_worst']:.1f})" for part in parts),
            f"{row['dense_recovered']:.1f}",
            f"{row['own_recovered']:.1f}",
            f"{100 * row['routing_accuracy']:.0f}",
        ]
        for row in figures["rows"]
    ]
    head = [
        "experts",
        "`reference`",
        "`budget`",
        "bytes / one model",
        "dense expert alone, %",
        "own expert, %",
    ]
    head += ["routed, %", "likelihood regained, dense, %", "the same, own expert, %"]
    about = " ".join(
        f"`{family}`: {how['experts']} experts, {how['prompts_per_task']} held-out prompts a task, {how['asked']} others "
        "of each task for the merge."
        for family, how in figures["families"].items()
    )
    return f"{table([*head, 'routed right, %'], rows)}\n\n{about}"


def dense_kept() -> str:
    """What the smallest artifact of each family keeps whose dense expert is a merge by prompts."""
    figures = load("dense")
    told = []
    for family, tasks in _COUNTED.items():
        rows = [r for r in figures["rows"] if (r["family"], r["dense"]) == (family, "regmean_pp")]
        row = min(rows, key=lambda row: row["bytes_over_base"])
        told.append(
            f"{tasks} kept {row['routed_mean']:.1f}% ({row['routed_worst']:.1f}% of the worst) in "
            f"{row['bytes_over_base']:.3f}x, the dense expert alone {row['dense_mean']:.1f}% "
            f"({row['dense_worst']:.1f}%)"
        )
    asked = next(iter(figures["families"].values()))["asked"]
    return (
        f"With {asked} prompts of each task and `reference: regmean_pp`, {'; '.join(told)}: routed, and without "
        "calibration ([how](docs/results/dense.md))."
    )


def scale_memory() -> str:
    """Memory and time of a merge as the experts become more."""
    merges = load("scale")["memory"]["merges"]
    counts, linear = list(merges["linear"]), merges["linear"]
    rows = [
        [
            f"`{name}`",
            *(
                f"{row[n]['peak_anonymous_bytes'] / 1e6:.0f} "
                f"({row[n]['seconds'] / linear[n]['seconds']:.1f})"
                for n in counts
            ),
        ]
        for name, row in merges.items()
    ]
    return table(["MB (time / `linear`)", *(f"{n} experts" for n in counts)], rows)


def scale() -> str:
    """Quality and bytes as the experts become more."""
    figures = load("scale")["quality"]
    counts = [count for count in figures if count.isdigit()]
    rows = [
        [
            name,
            *(f"{figures[n][name]['normalized_mean']:.1f}" for n in counts),
            *(f"{figures[n][name]['total_bytes_over_base']:.2f}" for n in counts),
        ]
        for name in figures[counts[0]]
        if "dense" not in name
    ]
    head = ["", *(f"mean, %, {n}" for n in counts), *(f"bytes / one model, {n}" for n in counts)]
    return table(head, rows)


def startup() -> str:
    """What the hook adds to the start of an interpreter."""
    figures = load("startup")
    rows = [
        [label, f"{figures[f'{case}_adds_wall_ms']:.2f}", f"{figures[f'{case}_adds_cpu_ms']:.2f}"]
        for case, label in (
            ("installed", "installed"),
            ("switched_off", "`MERGEKIT_MEDIATOR_AUTOLOAD=0`"),
        )
    ]
    head = ["the hook adds", "ms", "ms of the processor"]
    return (
        f"{table(head, rows)}\n\nThe median of {figures['runs']} starts; an interpreter without the "
        f"package takes {figures['absent_wall_ms']:.1f} ms."
    )


def faults() -> str:
    """How often each fault was tried, and how often nothing was lost."""
    rows = [
        [row["name"], str(row["tried"]), str(row["survived"])] for row in load("faults")["rows"]
    ]
    return table(["what happens", "tried", "survived"], rows)
