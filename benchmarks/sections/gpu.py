"""The sections about a GPU: what the card can do, and how near merging and serving come to it."""

from typing import Any

from sections.markdown import load, table

FORMS = ("low rank plus sparse", "sparse", "adapters")
GB = 1e9


def card() -> str:
    """The card, its driver, and what library calls reach on it."""
    figures = load("gpu")
    about, ceilings = figures["machine_card"], figures["ceilings"]
    names = {
        "copy_gb_per_second": "copy on the card, read and written, GB/s",
        "from_host_gb_per_second": "copy from host memory, GB/s",
        "from_pinned_gb_per_second": "copy from pinned host memory, GB/s",
        "bfloat16_tflops": "product of two matrices in bfloat16, TFLOP/s",
        "float32_tflops": "in float32 without TF32, TFLOP/s",
        "float64_tflops": "in float64, TFLOP/s",
    }
    rows = [[name, str(value)] for name, value in about.items()]
    rows += [[text, f"{ceilings[key]:,.0f}"] for key, text in names.items()]
    return table(["", ""], rows)


def merging() -> str:
    """Time and memory of merges on the card, and what an 8B model would take in proportion."""
    figures = load("gpu")
    merges = {n: m for n, m in figures["merging"].items() if isinstance(m, dict)}
    rows = []
    for label, row in merges.items():
        cells = [
            f"{row['seconds']:.1f}",
            f"{row['seconds'] / merges['linear']['seconds']:.2f}",
            f"{row['host_peak_bytes'] / GB:.2f}",
            f"{row['device_peak_bytes'] / GB:.2f}",
            f"{figures['minutes_of_8b'][label]:.1f}",
        ]
        rows.append([f"`{label}`", *cells])
    head = ["merge", "seconds", "over `linear`", "host memory, GB", "device memory, GB"]
    return table([*head, "minutes of 8B"], rows)


def few_layers() -> str:
    """Merges of one layer with the card and without it."""
    few = load("gpu")["few"]
    rows = []
    for label, with_card in few["cuda"].items():
        times = [with_card, few["cpu"][label]]
        if all(isinstance(row, dict) for row in times):
            seconds = [row["seconds"] for row in times]
            cells = [*[f"{s:.1f}" for s in seconds], f"{seconds[1] / seconds[0]:.1f}"]
            rows.append([f"`{label}`", *cells])
    return table(["merge", "with the card, s", "without, s", "ratio"], rows)


def serving() -> str:
    """Mixtures of three forms of experts on the card."""
    parts = load("gpu")["serving"]
    forms = [form for form in FORMS if isinstance(parts.get(form), dict)]

    def row(label: str, part: str, *keys: str, digits: int = 2) -> list[str]:
        cells = []
        for form in forms:
            value: Any = parts[form][part]
            for key in keys:
                value = value[key]
            cells.append(f"{value:.{digits}f}")
        return [label, *cells]

    rows = [
        row("entering, ms", "entering", "milliseconds", "enter"),
        row("writing the changed weights once, ms", "entering", "floor_ms"),
        row("entering over writing", "entering", "enter_over_bandwidth"),
        row("leaving over writing", "entering", "leave_over_bandwidth"),
        row("entering and leaving a blend of two, ms", "entering", "blend_of_two_in_and_out_ms"),
        row("decoding in a mixture, speed over the plain model", "decoding", "decode_over_dense"),
        row(
            "8 rows over 4 experts, rows form over one after another",
            "batches",
            "mixed_batch_speedup",
        ),
        row(
            "the same batch in rows, time over the dense expert alone", "batches", "rows_over_dense"
        ),
        row("the same batch in rows, ms", "batches", "milliseconds", "rows", digits=0),
    ]
    peft = parts.get("PEFT's mixed batch")
    if isinstance(peft, dict):
        time = f"{peft['milliseconds']['peft']:.0f}"
        cells = [time if form == "adapters" else "" for form in forms]
        rows.append(["PEFT's mixed batch of the same adapters, ms", *cells])
    return table(["", *forms], rows)


def host_memory() -> str:
    """Experts that wait in host memory."""
    part = load("gpu")["serving"]["host memory"]
    times, entered = part["milliseconds"], part["enter_milliseconds"]
    rows = [
        [
            f"an answer of {part['tokens']} tokens, ms",
            *[f"{times[name]:.1f}" for name in ("resident", "host")],
        ],
        ["entering, ms", *[f"{entered[name]:.2f}" for name in ("resident", "host")]],
    ]
    over = f"Time over that of resident experts: {part['host_over_resident']:.3f}."
    return table(["", "on the card", "in host memory"], rows) + "\n\n" + over


def steps() -> str:
    """Milliseconds of each step on one weight."""
    steps: dict[str, Any] = load("gpu")["steps"]
    rows = [[name, f"{value:,}"] for name, value in steps.items() if not isinstance(value, str)]
    return table(["step on a weight of 14336 x 4096", "ms"], rows)
