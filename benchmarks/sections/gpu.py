"""The sections about a GPU: what the card can do, and how near merging and serving come to it.

`gpu-before` was measured before the changes that it led to; the merges of `ties`, the adapters and PEFT were
measured then alone.
"""

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
    rows = [[name, str(value).strip()] for name, value in about.items()]
    rows += [[text, f"{ceilings[key]:,.0f}"] for key, text in names.items()]
    return table(["", ""], rows)


def merging() -> str:
    """Time and memory of merges on the card, and what an 8B model would take in proportion."""
    rows = []
    for name, run in (("gpu", "now"), ("gpu-before", "before")):
        figures = load(name)
        for label, row in figures["merging"].items():
            cells = [
                f"{row['seconds']:.1f}",
                f"{row['seconds'] / figures['merging']['linear']['seconds']:.2f}",
                f"{row['host_peak_bytes'] / GB:.2f}",
                f"{row['device_peak_bytes'] / GB:.2f}",
                f"{figures['minutes_of_8b'][label]:.1f}" if label != "adapters" else "",
            ]
            rows.append([f"`{label}`", run, *cells])
    head = ["merge", "run", "seconds", "over `linear`", "host memory, GB", "device memory, GB"]
    return table([*head, "minutes of 8B"], rows)


def serving() -> str:
    """Mixtures of three forms of experts on the card, before and now."""
    columns = [
        (f"{form}, {run}", parts[form])
        for form in FORMS
        for run, parts in (
            ("before", load("gpu-before")["serving"]),
            ("now", load("gpu")["serving"]),
        )
        if form in parts
    ]

    def row(label: str, *keys: str, digits: int = 2) -> list[str]:
        cells = []
        for _, value in columns:
            for key in keys:
                value = value[key]
            cells.append(f"{value:.{digits}f}")
        return [label, *cells]

    rows = [
        row("first entering, s", "entering", "first_enter_seconds"),
        row("entering again, ms", "entering", "milliseconds", "enter"),
        row("writing the changed weights once, ms", "entering", "floor_ms"),
        row("entering again over writing", "entering", "enter_over_bandwidth", digits=1),
        row("leaving over writing", "entering", "leave_over_bandwidth", digits=1),
        row("entering and leaving a blend of two, ms", "entering", "blend_of_two_in_and_out_ms"),
        row("decoding in a mixture, speed over the plain model", "decoding", "decode_over_dense"),
        row("8 rows over 4 experts, rows over one after another", "batches", "mixed_batch_speedup"),
        row("the same in rows, time over the dense expert's", "batches", "rows_over_dense"),
    ]
    return table(["", *(name for name, _ in columns)], rows)


def peft() -> str:
    """The sentence that compares rows of adapters with PEFT's mixed batch."""
    parts = load("gpu-before")["serving"]
    theirs = parts["PEFT's mixed batch"]["milliseconds"]["peft"]
    ours = parts["adapters"]["batches"]["milliseconds"]["rows"]
    return (
        f"PEFT's mixed batch of the same four adapters took {theirs:.0f} ms where ours took {ours:.0f} ms: "
        f"{theirs / ours:.1f} times as long."
    )


def steps() -> str:
    """Milliseconds of each step on one weight, before and now."""
    before: dict[str, Any] = load("gpu-before")["steps"]
    now: dict[str, Any] = load("gpu")["steps"]
    counted = ("coordinates", "rank", "storable")
    rows = [
        [name, f"{before[name]:.1f}" if name in before else "", f"{value:.1f}"]
        for name, value in now.items()
        if not name.startswith(counted)
    ]
    return table(["step on a weight of 14336 x 4096, ms", "before", "now"], rows)
