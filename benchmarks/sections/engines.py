"""The sections about engines: the cost of routing on vLLM, ranks of exported experts, and clusters."""

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


def exported() -> str:
    """What adapters of each rank keep."""
    rows = []
    for row in load("serving")["exported"]:
        extracted = row["extract_lora_gain_kept"]
        baked = ", the mean baked in" if row.get("baked") else ""
        rows.append(
            [
                f"{row['family']}, `reference: {row['reference']}`{baked}",
                str(row["rank"]),
                str(row["largest_rank"]),
                f"{100 * row['gain_kept']:.1f}",
                f"{100 * row['answers_kept']:.1f}",
                "not run" if extracted is None else f"{100 * extracted:.1f}",
            ]
        )
    head = ["experts", "rank", "largest used", "gain kept, %", "answers kept, %"]
    return table([*head, "`mergekit-extract-lora`, gain kept, %"], rows)


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
