"""Sections about routing: which router, whether blending helps, and which layers to route."""

from typing import Any

from sections.markdown import load, table


def router() -> str:
    """Routers with and without data, on wordings that they know and on new ones."""
    figures = load("router")
    rows = []
    for kind in ("hidden", "embedding"):
        for head, easy in figures["calibrated"][kind]["easy"].items():
            hard = figures["calibrated"][kind]["hard"][head]
            new, familiar = hard["hard new"], hard["hard familiar"]
            shares = easy["easy test"]["accuracy"], familiar["accuracy"], new["accuracy"]
            others = new["ece"], new["ood_near_auroc"], new["ood_far_auroc"]
            cells = [*(f"{100 * x:.1f}" for x in shares), *(f"{x:.3f}" for x in others)]
            rows.append([f"{kind}, {head}", *cells])
    for name, easy in figures["others"]["hidden"]["easy"].items():
        hard = figures["others"]["hidden"]["hard"][name]
        shares = easy["easy test"], hard["hard familiar"], hard["hard new"]
        label = f"hidden, {name}" if name.startswith(("nearest", "5 nearest")) else name
        rows.append([label, *[f"{100 * x:.1f}" for x in shares], "", "", ""])
    for name in ("response", "likelihood"):
        measured = load("router-no-data")[name]
        rows.append([f"{name}, no data", f"{100 * measured['accuracy']:.1f}", *[""] * 5])
    head = ["router", "easy", "familiar", "new wordings", "ECE", "AUROC near", "AUROC far"]
    return f"{table(head, rows)}\n\n{_router_findings(figures)}"


def _router_findings(figures: dict[str, Any]) -> str:
    by_wordings = figures["hidden_hard_new_accuracy_by_wordings"]
    shares = ", ".join(f"{100 * share:.1f}" for share in by_wordings.values())
    chance = figures["ece_if_calibrated"]
    return "\n".join(
        [
            f"- One request by `embedding` takes {figures['time']['embedding']['cpu_median_ms']:.2f} "
            f"ms of its thread (p99 {figures['p99_ms']:.2f} ms, on a machine that others kept busy). "
            f"By `hidden` it takes {figures['hidden_over_prefill']:.2f} of a prefill (p99 "
            f"{figures['hidden_over_prefill_p99']:.2f}).",
            f"- With twenty prompts per expert, worded in {', '.join(by_wordings)} ways, {shares}% of "
            "the new wordings find their expert.",
            "- The prompts of a wording are mostly right or wrong together. With as many wordings as "
            "here, a perfectly calibrated router of the same confidence would show an ECE of "
            f"{chance['mean']:.3f} on average, and of more than {chance['p95']:.3f} one time in "
            "twenty.",
        ]
    )


def router_many() -> str:
    """Accuracy and time of a calibrated router as the experts become more."""
    figures = load("router-many")
    rows = [
        [
            count,
            f"{100 * row['accuracy']:.1f}",
            f"{row['fit_seconds']:.1f}",
            f"{row['median_ms']:.2f}",
            f"{row['p99_ms']:.0f}",
        ]
        for count, row in figures["by_experts"].items()
    ]
    head = ["experts", "routed right, %", "to fit, s", "a decision, ms", "p99, ms"]
    removed = figures["removing_one"]
    return (
        f"{table(head, rows)}\n\n{figures['prompts_per_expert']} prompts per expert. After one expert "
        f"is removed, {100 * removed['routed_as_before']:.0f}% of {removed['requests_of_others']} "
        "requests of the others are routed as before."
    )


def blending() -> str:
    """Requests that no expert has seen the like of: base, dense expert, one expert, or a blend."""
    rows = []
    for family, figures in load("blending")["families"].items():
        systems = figures["systems"]
        best = figures["best_single"]
        labels = {
            "base": "base",
            "dense": "dense",
            best: f"best single expert ({best})",
            **{name: name for name in systems if ":" in name},
        }
        for name, label in labels.items():
            row = systems[name]
            cells = [f"{row['log_likelihood']:.3f}", f"{100 * row['accuracy']:.1f}"]
            rows.append([family, label, *cells])
    prompts = min(f["prompts_per_task"] for f in load("blending")["families"].values())
    body = table(["experts", "answered by", "nats / token", "exact match, %"], rows)
    return f"{body}\n\n{prompts} prompts per task: small samples. {_blending_findings()}"


def _blending_findings() -> str:
    """How far the default is from the better of base and dense expert, in the worse family."""
    losses = []
    for figures in load("blending")["families"].values():
        systems = figures["systems"]
        best = max(systems[name]["log_likelihood"] for name in ("base", "dense"))
        losses.append(1 - systems["calibrated: auto, far blended"]["log_likelihood"] / best)
    worse = -100 * min(losses)
    return (
        "`calibrated: auto, far blended` is the default. In nats it is at most "
        f"{worse:.1f}% worse than the better of base and dense expert."
    )


def layers() -> str:
    """The loss that a third of the blocks recovers, chosen by each metric."""
    rows = load("layers")["rows"]
    head = ["a third of the blocks, those of most"]
    random = ["(random choice, mean of five)"]
    best = ["gain of the block alone, with the answers"]
    for row in rows:
        head += [f"{row['family']}: ρ", "most", "least"]
        random += ["", f"{100 * _random_third(row):.0f}", ""]
        best += ["1", f"{100 * row['best_third'][0]:.0f}", ""]
    body = [best]
    for metric in rows[0]["metrics"]:
        cells = [metric]
        for row in rows:
            measured = row["metrics"][metric]
            shares = [f"{100 * measured[end]:.0f}" for end in ("most", "least")]
            cells += [f"{measured['rank_correlation']:.2f}", *shares]
        body.append(cells)
    return table(head, [*body, random])


def layer_findings() -> str:
    """What the table says of conflict, and of a block's place."""
    rows = load("layers")["rows"]
    metrics = [m for m in rows[0]["metrics"] if m.startswith(("sign", "mass", "dispersion"))]
    thirds = [
        (row["metrics"][metric]["most"], _random_third(row)) for row in rows for metric in metrics
    ]
    less = sum(third < random for third, random in thirds)
    middle = [100 * row["metrics"]["middle"]["most"] for row in rows]
    states = [100 * row["metrics"]["last state, prompts"]["most"] for row in rows]
    alone = max(lost for row in rows for layer, lost in row["lost"].items() if layer.isdigit())
    return (
        f"**Conflict does not tell where to route.** The third of the blocks that `sign`, `mass` or "
        f"`dispersion` puts first recovers less than a third drawn at random in {less} of "
        f"{len(thirds)} cases. A block's place does tell: the middle third recovers "
        f"{min(middle):.0f} to {max(middle):.0f}%, and the third that six prompts choose "
        f"{min(states):.0f} to {max(states):.0f}%. Any single block may be averaged while all others "
        f"are routed: that costs at most {100 * alone:.1f}% of the loss."
    )


def _random_third(row: dict[str, Any]) -> float:
    shares: list[float] = row["random_third"]
    return sum(shares) / len(shares)
