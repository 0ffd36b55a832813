"""The section about serving: time and memory beside a plain model's."""

from sections.markdown import load, table

RATIOS = {
    "entering a mixture / dense in-place add": ("enter", "enter_over_dense_add"),
    "leaving it / dense in-place add": ("enter", "leave_over_dense_add"),
    "loading a checkpoint, and reading it once / entering": ("enter", "enter_speedup_over_load"),
    "`from_pretrained` alone / entering": ("enter", "enter_speedup_over_from_pretrained_alone"),
    "entering / PEFT set_adapter + merge_adapter": ("enter", "enter_over_peft"),
    "decoding speed / plain dense model": ("decode", "decode_over_dense"),
    "8 rows over 4 experts, rows / merge": ("batch", "mixed_batch_speedup"),
}
KINDS = {"sparse": "sparse, 10% exact", "low_rank": "adapters' factors"}


def runtime() -> str:
    """Ratios, memory and the forms of a batch, for two kinds of experts and two numbers of threads."""
    figures = load("runtime")
    columns = [(kind, str(threads)) for threads in figures["threads"] for kind in KINDS]
    runs = [figures[kind]["threads"][threads] for kind, threads in columns]
    rows = [
        [name, *[f"{run[part][key]:.2f}" for run in runs]] for name, (part, key) in RATIOS.items()
    ]
    for index, count in enumerate((4, 8, 16)):
        sizes = [figures[kind]["memory"][index]["resident_bytes"] for kind, _ in columns]
        rows.append([f"resident MB of {count} experts", *[f"{size / 1e6:.0f}" for size in sizes]])
    for forms in zip(*(run["forms"] for run in runs), strict=True):
        tokens = forms[0]["new_tokens"]
        cells = [f"{row['rows_over_merge']:.2f}, {row['auto']}" for row in forms]
        rows.append([f"one answer of {tokens} tokens, time in rows / merge; `auto` takes", *cells])
    return table(["", *(f"{KINDS[kind]}, threads: {n}" for kind, n in columns)], rows)
