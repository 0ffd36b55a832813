"""The sections about engines: the cost of routing on vLLM, ranks of exported experts, and clusters."""

from typing import Any

from sections.markdown import load, table

# Of the simulated clusters, those on the page: requests a second and engines.
SHOWN = ((100, 4), (100, 32), (1000, 32))


def serving() -> str:
    """Answers, throughput and latency on a real vLLM."""
    figures = load("serving")
    rates, times, decision = figures["tokens_per_second"], figures["latency"], figures["decision"]
    runs = [f"{min(some):.1f} to {max(some):.1f}" for some in rates.values()]
    rows = [
        ["answers that are those of `MediatorModel`", f"{100 * figures['same_answers']:.1f}%"],
        ["answers compared, of experts and blends", str(figures["answers"])],
        [
            "prompts that `auto` sends to their expert",
            f"{100 * figures['auto_right_experts']:.1f}%",
        ],
        *([f"tokens a second, {mode}", run] for mode, run in zip(rates, runs, strict=True)),
        ["throughput, `auto` / named", f"{figures['auto_throughput_over_named']:.2f}"],
        ["throughput, named / plain", f"{figures['named_throughput_over_plain']:.2f}"],
        ["one token, named, median / p99 ms", _times(times["named"])],
        ["one token, `auto`, median / p99 ms", _times(times["auto"])],
        ["a decision of the router, median / p99 ms", _decision(decision, "wall")],
        ["the same, time of its thread", _decision(decision, "cpu")],
    ]
    return table(["", ""], rows)


# The columns of the table of ranks: the reference, and the norms that the served model has.
_SERVED = {
    "`reference: base`": ("base", "dense"),
    "the same, the mean of the norms baked in": ("base", "mean"),
    "`reference: mean`": ("mean", "dense"),
}
_EXTRACTED = {
    "`mergekit-extract-lora`": "extract_lora",
    "the same without norms": "extract_lora_no_norms",
}


def exported() -> str:
    """What adapters of each rank keep, family by family."""
    served: dict[tuple[str, str], dict[tuple[str, str], dict[str, Any]]] = {}
    for row in load("serving")["exported"]:
        norms = row.get("norms") or ("mean" if row.get("baked") else "dense")
        rank = f"auto, {100 * row['auto']:g}%" if row.get("auto") else str(row["rank"])
        served.setdefault((row["family"], rank), {})[row["reference"], norms] = row
    rows = []
    for (family, rank), variants in served.items():
        some = next(iter(variants.values()))
        ours = [_kept(variants.get(key), "") for key in _SERVED.values()]
        theirs = [_kept(some, f"{name}_") for name in _EXTRACTED.values()]
        shown = [variants[key] for key in _SERVED.values() if key in variants]
        answers = min(row["answers_kept"] for row in shown)
        largest = max(row["largest_rank"] for row in shown)
        rows.append([family, rank, str(largest), *ours, f"{100 * answers:.1f}", *theirs])
    head = ["experts", "rank", "largest used", *_SERVED, "answers kept, least, %", *_EXTRACTED]
    return table(head, rows)


def _kept(row: dict[str, Any] | None, prefix: str) -> str:
    """The gain that is kept, the mean over experts and the worst in brackets, in percent."""
    mean, worst = ((row or {}).get(f"{prefix}{part}gain_kept") for part in ("", "worst_"))
    if mean is None:
        return "not run"
    return f"{100 * mean:.2f}" + (f" ({100 * worst:.2f})" if worst is not None else "")


def rank_errors() -> str:
    """What the stored form, adapters of it and the best adapters leave out of a fine-tune."""
    keys = ["stored", "adapter_16", "best_16", "adapter_64", "best_64"]
    rows = [
        [row["expert"], f"{row['bits']:g}", *(f"{100 * row[key]:.1f}" for key in keys)]
        for row in load("serving")["rank_errors"]
    ]
    head = ["expert", "bits per parameter", "stored", "rank 16 of it", "rank 16 of the fine-tune"]
    return table([*head, "rank 64 of it", "rank 64 of the fine-tune"], rows)


def replicas() -> str:
    """Caches and tails of simulated clusters."""
    figures = load("replicas")
    keys = ("adapters_per_replica", "card_misses", "disk_loads", "turns_kept", "added_p99_s")
    rows = []
    for row in figures["rows"]:
        if (row["rate"], row["replicas"]) not in SHOWN:
            continue
        first, *parts, last = (row[key] for key in keys)
        cells = [f"{first:.0f}", *(f"{100 * part:.1f}" for part in parts), f"{1000 * last:.0f}"]
        about = [str(row[key]) for key in ("experts", "rate", "replicas", "policy")]
        rows.append([*about, *cells])
    head = ["experts", "requests/s", "replicas", "policy", "adapters a replica", "card misses, %"]
    return table([*head, "disk loads, %", "turns kept, %", "added p99, ms"], rows)


def _times(times: dict[str, float]) -> str:
    return f"{times['median_ms']:.0f} / {times['p99_ms']:.0f}"


def _decision(times: dict[str, float], clock: str) -> str:
    return f"{times[f'{clock}_median_ms']:.1f} / {times[f'{clock}_p99_ms']:.1f}"
