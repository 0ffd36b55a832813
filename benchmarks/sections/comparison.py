"""Sections about whole systems: what each keeps of the experts, in how many bytes."""

from typing import Any

from mergekit_mediator.methods.with_prompts import WITH_PROMPTS
from sections.markdown import load, table

# The targets at 1.06 of one model for four experts, and 1.10 for eight.
MEAN_TARGET, WORST_TARGET = 99.5, 97.0
DRAW = 1_000_000  # between the seeds of two draws, as in train_experts.py
# The experts of the latest rows on merge methods.
_ANEW = "strong4, trained anew in float32"
_ASKING = {method.spec.name for method in WITH_PROMPTS}


def systems() -> str:
    """The five rows of the README."""
    rows = load("experts-4")["systems"]
    method = rows["best_static"]["coefficients"].split(" ")[0]
    names = {
        "base": "base model",
        "best_static": f"best of mergekit's own merges (`{method}`)",
        "extract_lora 16": "extracted LoRA, rank 16",
        "mediator": "**mergekit-mediator**, `budget: 1.06x`",
        "experts": "the four experts",
    }
    body = [
        [
            label,
            f"{rows[name]['normalized_mean']:.1f}",
            f"{rows[name]['normalized_worst']:.1f}",
            f"{rows[name]['total_bytes_over_base']:.2f}",
        ]
        for name, label in names.items()
    ]
    return table(["", "kept, %", "worst task, %", "bytes / one model"], body)


def kept() -> str:
    """The sentences of the README on the default, `keep: 0.99`."""
    draws = [load(f"experts-4-{draw}-keep") for draw in ("again", "third")]
    own = [draw["systems"]["mediator_oracle"] for draw in draws]
    routed = [draw["systems"]["mediator"] for draw in draws]
    size = max(row["total_bytes_over_base"] for row in own)
    means = " and ".join(f"{row['normalized_mean']:.1f}%" for row in routed)
    three, four = (load(name)["systems"] for name in ("experts-gemma-keep", "experts-gemma"))
    return (
        f"The default, `keep: 0.99`, took {size:.2f} of one model for two other draws of these tasks: with its own "
        f"expert every task kept {min(row['normalized_worst'] for row in own):.1f}% or more, and routed without "
        f"calibration {means}, on {min(draws[0]['tasks'].values())} prompts each "
        "([how](docs/results/four-experts-again.md#in-the-default-form)). Of three fine-tunes of Gemma 3 270M "
        f"it kept {_mean_and_worst(three['mediator'])} in {three['mediator']['total_bytes_over_base']:.2f}, routed likewise; "
        f"of four, as low rank plus sparse, {_mean_and_worst(four['mediator'])}, and with twenty prompts per expert "
        f"{_mean_and_worst(four['mediator_calibrated'])} ([how](docs/results/second-model.md))."
    )


def _mean_and_worst(row: dict[str, Any]) -> str:
    return f"{row['normalized_mean']:.1f}% ({row['normalized_worst']:.1f}%)"


def draws(*names: str) -> str:
    """Merges of several draws beside each other: what each expert keeps by itself, and as it is routed."""
    body = []
    for name in names:
        figures = load(name)
        rows = figures["systems"]
        for tuned in ("", "_tuned"):
            if f"mediator{tuned}" not in rows:
                continue
            own, routed = rows[f"mediator{tuned}_oracle"], rows[f"mediator{tuned}"]
            by = ", ".join(f"`{key}: {value}`" for key, value in own["parameters"].items())
            prompts = figures["prompts_tuned_on_per_task"]
            body.append(
                [
                    {1: "second", 2: "third"}[figures["seeds"]["report"] // DRAW],
                    str(len(figures["tasks"])),
                    f"{by}, {prompts} prompts each" if tuned else by,
                    *(
                        f"{row['normalized_mean']:.1f} ({row['normalized_worst']:.1f})"
                        for row in (own, routed)
                    ),
                    f"{own['total_bytes_over_base']:.3f}",
                    f"{own['resident_bytes_over_base']:.2f}",
                    f"{own['merge_cpu_seconds']:.0f}",
                ]
            )
    head = ["draw", "experts", "stored by", "by its own expert, %", "routed, %"]
    return table([*head, "bytes / one model", "memory / one model", "merge, CPU s"], body)


def against() -> str:
    """The sentences of the README that go against us."""
    rows = load("experts-4")["systems"]
    again, third, short = (
        load(f"experts-4-{name}")["systems"]["mediator"] for name in ("again", "third", "cut-short")
    )
    costs = load("merge-cost")["rows"]
    ours = next(row for name, row in costs.items() if name.startswith("budget"))["cpu_seconds"]
    ties = costs["ties"]["cpu_seconds"]
    measured = [row for row in load("methods")["rows"] if row["family"] == _ANEW]
    static = max(measured, key=lambda row: row["normalized_mean"])
    data_free = max(
        (row for row in measured if row["method"] not in _ASKING),
        key=lambda row: row["normalized_mean"],
    )
    return (
        f"On a second draw of the same four tasks it kept {again['normalized_mean']:.1f}%, and "
        f"{again['normalized_worst']:.1f}% of the worst, and on a third {third['normalized_mean']:.1f}% and "
        f"{third['normalized_worst']:.1f}%. Where the training of two of them was cut short, it kept "
        f"{short['normalized_mean']:.1f}% and {short['normalized_worst']:.1f}% ([why](docs/results/four-experts-again.md)). Of the same four, trained anew, a static merge by "
        f"`{static['method']}` with a few prompts of each task kept {static['normalized_mean']:.1f}% "
        f"({static['normalized_worst']:.1f}% of the worst) in the bytes of one model, and `{data_free['method']}` without "
        f"prompts {data_free['normalized_mean']:.1f}% ({data_free['normalized_worst']:.1f}%) "
        f"([how](docs/merge_methods.md#what-they-keep)). Ours took {ours / ties:.1f} times the "
        "[processor time](docs/results/merge-cost.md) of `ties`, and serving takes "
        f"{rows['mediator']['resident_bytes_over_base']:.1f} models "
        "of memory once all experts are decoded."
    )


def experts(name: str) -> str:
    """The systems of one comparison, with the picture."""
    head = ["system", "mean, %", "worst, %", "likelihood regained, %", "bytes / one model"]
    head += ["memory / one model", "merge, CPU s"]
    forms = {
        "normalized_mean": ".1f",
        "normalized_worst": ".1f",
        "recovered_mean": ".1f",
        "total_bytes_over_base": ".3f",
        "resident_bytes_over_base": ".2f",
        "merge_cpu_seconds": ".0f",
    }
    rows = [
        [system, *("" if row.get(k) is None else format(row[k], f) for k, f in forms.items())]
        for system, row in load(name)["systems"].items()
    ]
    prompts = min(load(name)["tasks"].values())
    about = f"{prompts} held-out prompts per task: one answer is {100 / prompts:.1f}% of a task."
    picture = f"![Quality against bytes](../../benchmarks/results/{name}.png)"
    return f"{table(head, rows)}\n\n{about}\n\n{picture}"


def findings(name: str) -> str:
    """What a comparison says of the artifact, tuned if it was, and not, and of our targets."""
    figures = load(name)
    rows = figures["systems"]
    plain, tuned = rows["mediator"], rows.get("mediator_tuned")
    lines = [_untuned(rows)]
    if tuned is not None:
        lines.append(
            f"- Tuned on {figures['prompts_tuned_on_per_task']} prompts per expert {_kept(tuned)}. "
            f"{_lost(rows, 'mediator_tuned')} Tuning and merging take "
            f"{tuned['merge_cpu_seconds'] / plain['merge_cpu_seconds']:.0f} times the processor time "
            "of the merge alone."
        )
    lines.append(_routed(plain))
    targets = [
        f"{case} prompts, the mean {_met(row['normalized_mean'], MEAN_TARGET)} and the worst task "
        f"{_met(row['normalized_worst'], WORST_TARGET)}."
        for case, row in (("Without", plain), ("With", tuned))
        if row is not None
    ]
    lines.append(
        f"- Our targets were {MEAN_TARGET}% on the mean and {WORST_TARGET:.0f}% for the worst task. "
        + " ".join(targets)
    )
    return "\n".join(lines)


def second_base() -> str:
    """What the artifact keeps of the experts of the second base model: with its own expert, and as it is routed."""
    figures = load("experts-gemma")
    rows = figures["systems"]
    own, informed, static = (
        rows[n] for n in ("mediator_oracle", "mediator_calibrated", "best_static")
    )
    return "\n".join(
        [
            f"- With the expert of each task {_kept(own)}. {_lost(rows, 'mediator_oracle')}",
            _untuned(rows),
            _routed(rows["mediator"]),
            f"- Calibrated on {figures['calibration_prompts_per_task']} prompts per expert, without answers, "
            f"{_kept(informed)}.",
            f"- Of the best static merge that was tried, `{static['coefficients']}`, {_kept(static)}.",
        ]
    )


def rivals() -> str:
    """What the rivals keep at about our bytes, and where they keep as much."""
    rows = load("experts-4")["systems"]
    ours = rows["mediator"]
    lora, twin = ({r: rows[f"{name} {r}"] for r in (4, 16)} for name in _LOW_RANK)
    return (
        f"At {ours['total_bytes_over_base']:.2f} of one model the artifact keeps "
        f"{ours['normalized_mean']:.1f}%. Extracted adapters of rank 4 take "
        f"{lora[4]['total_bytes_over_base']:.2f} and keep {lora[4]['normalized_mean']:.1f}%; "
        f"Twin-Merging of rank 4 keeps {twin[4]['normalized_mean']:.1f}%. At rank 16 they take "
        f"{lora[16]['total_bytes_over_base']:.2f} and keep {lora[16]['normalized_mean']:.1f}% and "
        f"{twin[16]['normalized_mean']:.1f}%. What merges cost is [measured apart](merge-cost.md)."
    )


_LOW_RANK = ("extract_lora", "twin_merging")


def budget_split() -> str:
    """Where the second draw loses whose training was cut short, and what equal bits keep."""
    figures, ablations = load("experts-4-cut-short"), load("ablations")["rows"]
    rows = figures["systems"]
    kept = {
        task: 100 * rows["mediator"]["tasks"][task]["accuracy"] / score["accuracy"]
        for task, score in rows["experts"]["tasks"].items()
    }
    worst = min(kept, key=lambda task: kept[task])
    equal = ablations["low rank plus sparse, bits: 0.15"]
    budget = ablations["mediator"]
    return (
        f"The loss is not spread: of `{worst}` the artifact keeps {kept[worst]:.1f}%, of the "
        f"others {min(k for task, k in kept.items() if task != worst):.1f}% or more. On the first "
        f"{min(load('ablations')['prompts'].values())} prompts of each task, `bits: 0.15`, the same "
        f"for every expert, keeps {equal['normalized_mean']:.1f}% and "
        f"{equal['normalized_worst']:.1f}% of the worst in {equal['total_bytes_over_base']:.3f} of "
        f"one model, where the budget keeps {budget['normalized_mean']:.1f}% and "
        f"{budget['normalized_worst']:.1f}% in {budget['total_bytes_over_base']:.3f} "
        "([ablations](ablations.md))."
    )


def ablations() -> str:
    """One row for each part that is left out or replaced."""
    forms = {
        "normalized_mean": ".1f",
        "normalized_worst": ".1f",
        "recovered_mean": ".1f",
        "total_bytes_over_base": ".3f",
    }
    figures = load("ablations")
    rows = [
        [name, *(format(row[key], form) for key, form in forms.items())]
        for name, row in figures["rows"].items()
    ]
    head = ["", "mean, %", "worst, %", "likelihood regained, %", "bytes / one model"]
    prompts = min(figures["prompts"].values())
    about = (
        f"{prompts} held-out prompts per task: one answer is {100 / prompts:.1f}% of a task. "
        "Rows within two points of each other are alike; likelihood tells more."
    )
    return f"{table(head, rows)}\n\n{about}"


def _untuned(rows: dict[str, Any]) -> str:
    plain = rows["mediator"]
    return (
        f"- Without prompts {_kept(plain)}, in {plain['total_bytes_over_base']:.2f} of one model. "
        f"{_lost(rows, 'mediator')}"
    )


def _routed(row: dict[str, Any]) -> str:
    return (
        f"- Routing sends {100 * row['routing_accuracy']:.0f}% of the prompts to the expert of "
        "their task, without calibration data."
    )


def _kept(row: dict[str, Any]) -> str:
    return (
        f"{row['normalized_mean']:.1f}% are kept on the mean and "
        f"{row['normalized_worst']:.1f}% of the worst task"
    )


def _lost(rows: dict[str, Any], name: str) -> str:
    """The net number of answers that the experts give and a system does not."""
    pairs = [
        (
            score["n"],
            round(score["n"] * (score["accuracy"] - rows[name]["tasks"][task]["accuracy"])),
        )
        for task, score in rows["experts"]["tasks"].items()
    ]
    lost, asked = sum(loss for _, loss in pairs), sum(n for n, _ in pairs)
    if lost < 0:
        return f"On balance {-lost} of {asked:,} answers are right that the experts get wrong."
    return f"On balance {lost} of {asked:,} answers are lost."


def _met(value: float, target: float) -> str:
    if value >= target:
        return f"meets its target by {value - target:.2f}"
    return f"misses its target by {target - value:.2f}"
