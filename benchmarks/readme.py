"""Put the tables that benchmarks found, and the list of files, into the README.

    python tests/benchmarks/readme.py

Each stands between `<!-- NAME -->` and `<!-- end NAME -->`. A test holds the README to it.
"""

import ast
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
ROOMS = {
    "Start and configure": "__init__ _autoload _build plugin config settings expert_names keys "
    "cli cli_merge",
    "Merge": "architecture planner weights headers passes conflict threshold plan dense narrow dense_writer slopes storing lora merge importance "
    "checkpoint licenses estimate curve workers",
    "Tune on prompts": "lessons tuning teacher distil tunable",
    "Store": "sparse factor_steps factors approximate budget allocate bits entropy description codec factor_codec "
    "expert_file artifact loaded_files",
    "Publish": "staging staging_directories model_files exchange in_place output_lock durable",
    "Route": "prompts contexts router router_file response hidden calibrated calibrated_file calibration_data "
    "background heads confidence fit_router calibrate routers",
    "Run": "loading batches locate prefetch residency mixture rows row_modules caches serving requests routed runtime remote remote_code",
    "Report": "tasks task_options evaluate prefix contenders scorer results quality_plot compare rivals "
    "rival_systems cli_evaluate answer card report inspection demo errors",
}


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    path.write_text(filled(text), encoding="utf-8")


def filled(text: str) -> str:
    """The README with every section made anew."""
    for name, make in SECTIONS.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)"
        section = make()
        text = re.sub(pattern, lambda m, s=section: f"{m[1]}{s}\n{m[2]}", text, flags=re.DOTALL)
    return text


def tree() -> str:
    lines = ["| file | purpose |", "| --- | --- |"]
    for room, names in ROOMS.items():
        lines.append(f"| **{room}** | |")
        for name in names.split():
            source = (ROOT / "mergekit_mediator" / f"{name}.py").read_text(encoding="utf-8")
            text = ast.get_docstring(ast.parse(source)) or ""
            first = " ".join(text.split("\n\n")[0].split()).rstrip(".").replace("|", "\\|")
            lines.append(f"| `{name}.py` | {first} |")
    return "\n".join(lines)


def demo() -> str:
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
            f"{asked // len(skills)} held-out prompts per skill; {right} of {asked} routed to their "
            f"own expert, without any calibration data. Sparse experts: {experts}; everything "
            f"together is {sizes['total_over_dense']:.3f} of one model "
            f"({sizes['dense_bytes'] / 1e6:.0f} MB).",
        ]
    )


def merge_cost() -> str:
    figures = load("merge-cost")
    rows = []
    for name, row in (("`route: auto`", figures), ("`route: all`", figures["all_routed"])):
        cells = ["wall_over_linear", "wall_over_ties", "peak_memory_over_linear"]
        rows.append([name, *[f"{row[cell]:.2f}" for cell in cells]])
    head = ["", "time / `linear`", "time / `ties`", "peak memory / `linear`"]
    return table(head, rows)


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
    about = f"{prompts} held-out prompts per task: one answer is {100 / prompts:.1f}%."
    picture = f"![Quality against bytes](tests/benchmarks/results/{name}.png)"
    return f"{table(head, rows)}\n\n{about}\n\n{picture}"


def ablations() -> str:
    rows = [
        [
            name,
            f"{row['normalized_mean']:.1f}",
            f"{row['normalized_worst']:.1f}",
            f"{row['recovered_mean']:.1f}",
            f"{row['total_bytes_over_base']:.3f}",
        ]
        for name, row in load("ablations")["rows"].items()
    ]
    head = ["", "mean, %", "worst, %", "likelihood regained, %", "bytes / one model"]
    return table(head, rows)


def scale_memory() -> str:
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


def runtime() -> str:
    figures = load("runtime")
    names = {
        "entering a mixture / dense in-place add": ("enter", "enter_over_dense_add"),
        "leaving it / dense in-place add": ("enter", "leave_over_dense_add"),
        "loading a checkpoint, and reading it once / entering": (
            "enter",
            "enter_speedup_over_load",
        ),
        "`from_pretrained` alone / entering": (
            "enter",
            "enter_speedup_over_from_pretrained_alone",
        ),
        "entering / PEFT set_adapter + merge_adapter": ("enter", "enter_over_peft"),
        "decoding speed / plain dense model": ("decode", "decode_over_dense"),
        "8 rows over 4 experts, rows / merge": ("batch", "mixed_batch_speedup"),
    }
    kinds = {"sparse": "sparse, 10% exact", "low_rank": "adapters' factors"}
    columns = [(kind, str(threads)) for threads in figures["threads"] for kind in kinds]
    found = [figures[kind]["threads"][threads] for kind, threads in columns]
    rows = [
        [name, *[f"{one[part][key]:.2f}" for one in found]] for name, (part, key) in names.items()
    ]
    for index, count in enumerate((4, 8, 16)):
        sizes = [figures[kind]["memory"][index]["resident_bytes"] for kind, _ in columns]
        rows.append([f"resident MB of {count} experts", *[f"{size / 1e6:.0f}" for size in sizes]])
    for forms in zip(*(one["forms"] for one in found), strict=True):
        tokens = forms[0]["new_tokens"]
        cells = [f"{row['rows_over_merge']:.2f}, {row['auto']}" for row in forms]
        rows.append([f"one answer of {tokens} tokens, time in rows / merge; `auto` takes", *cells])
    heads = [f"{kinds[kind]}, threads: {threads}" for kind, threads in columns]
    return table(["", *heads], rows)


# Of the rows of codec.json, enough to see the curves.
CODECS = {
    *("bits: 0.05", "bits: 0.08", "bits: 0.15", "bits: 0.2", "bits: 0.5", "bits: 1"),
    *("extract-lora 1", "extract-lora 4", "extract-lora 16"),
    *("adapter", "exact 0.1", "sign 1"),
}


def codec() -> str:
    rows = [
        [
            f"`{row['codec']}`",
            row["family"],
            f"{row['bits_per_parameter']:.3f}",
            f"{row['bytes_per_expert'] / 1e6:.1f}",
            f"{row['relative_error']:.2f}",
            f"{row['answer_log_likelihood']:.3f}",
            f"{100 * row['loss_recovered']:.1f}",
            f"{100 * row['accuracy_over_expert']:.1f}",
        ]
        for row in sorted(
            load("codec")["rows"], key=lambda r: (r["family"], r["bits_per_parameter"])
        )
        if row["codec"] in CODECS
    ]
    head = [
        "stored as",
        "experts",
        "bits per parameter",
        "MB",
        "squared error",
        "nats / token",
        "loss recovered, %",
        "accuracy / expert, %",
    ]
    return table(head, rows)


def router() -> str:
    figures = load("router")
    rows = []
    for kind in ("hidden", "embedding"):
        for head, easy in figures["calibrated"][kind]["easy"].items():
            hard = figures["calibrated"][kind]["hard"][head]
            new, familiar = hard["hard new"], hard["hard familiar"]
            shares = easy["easy test"]["accuracy"], familiar["accuracy"], new["accuracy"]
            others = new["ece"], new["ood_near_auroc"], new["ood_far_auroc"]
            rows.append(
                [
                    f"{kind}, {head}",
                    *[f"{100 * x:.1f}" for x in shares],
                    *[f"{x:.3f}" for x in others],
                ]
            )
    for name, easy in figures["others"]["hidden"]["easy"].items():
        hard = figures["others"]["hidden"]["hard"][name]
        shares = easy["easy test"], hard["hard familiar"], hard["hard new"]
        label = f"hidden, {name}" if name.startswith(("nearest", "5 nearest")) else name
        rows.append([label, *[f"{100 * x:.1f}" for x in shares], "", "", ""])
    for name in ("response", "likelihood"):
        found = load("router-no-data")[name]
        rows.append([f"{name}, no data", f"{100 * found['accuracy']:.1f}", *[""] * 5])
    head = ["router", "easy", "familiar", "new wordings", "ECE", "AUROC near", "AUROC far"]
    by_wordings = figures["hidden_hard_new_accuracy_by_wordings"]
    ways, found = list(by_wordings), [f"{100 * x:.1f}" for x in by_wordings.values()]
    chance = figures["ece_if_calibrated"]
    return "\n".join(
        [
            table(head, rows),
            "",
            f"One request by `embedding` takes {figures['time']['embedding']['cpu_median_ms']:.2f} ms of "
            f"its thread (p99 {figures['p99_ms']:.2f} ms, on a machine that others kept busy); by "
            f"`hidden` {figures['hidden_over_prefill']:.2f} of a prefill (p99 "
            f"{figures['hidden_over_prefill_p99']:.2f}).",
            "",
            f"Twenty prompts per expert, worded in {', '.join(ways)} ways: {', '.join(found)}% of new wordings.",
            "",
            "The prompts of a wording are mostly right or wrong together. With as many wordings as here a "
            "perfectly calibrated router of the same confidence would be measured to have an ECE of "
            f"{chance['mean']:.3f} on average, and of more than {chance['p95']:.3f} one time in twenty.",
        ]
    )


def blending() -> str:
    rows = []
    for family, figures in load("blending")["families"].items():
        systems = dict(figures["systems"])
        best = figures["best_single"]
        kept = {
            "base": "base",
            "dense": "dense",
            best: f"best single expert ({best})",
            **{name: name for name in systems if ":" in name},
        }
        for name, label in kept.items():
            row = systems[name]
            rows.append(
                [family, label, f"{row['log_likelihood']:.3f}", f"{100 * row['accuracy']:.1f}"]
            )
    return table(["experts", "answered by", "nats / token", "exact match, %"], rows)


def layers() -> str:
    rows = load("layers")["rows"]
    head = ["a third of the blocks, those of most"]
    random = ["(random choice, mean of five)"]
    best = ["gain of the block alone, with the answers"]
    for row in rows:
        head += [f"{row['family']}: ρ", "most", "least"]
        shares = row["random_third"]
        random += ["", f"{100 * sum(shares) / len(shares):.0f}", ""]
        best += ["1", f"{100 * row['best_third'][0]:.0f}", ""]
    body = [best]
    for metric in rows[0]["metrics"]:
        cells = [metric]
        for row in rows:
            found = row["metrics"][metric]
            shares = [f"{100 * found[end]:.0f}" for end in ("most", "least")]
            cells += [f"{found['rank_correlation']:.2f}", *shares]
        body.append(cells)
    return table(head, [*body, random])


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def load(name: str) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return figures


EXPERTS = ("experts-4", "experts-4-again", "experts-8", "experts-overlap")
SECTIONS = {
    "tree": tree,
    "demo": demo,
    "merge-cost": merge_cost,
    **{name: partial(experts, name) for name in EXPERTS},
    "ablations": ablations,
    "scale-memory": scale_memory,
    "scale": scale,
    "runtime": runtime,
    "codec": codec,
    "layers": layers,
    "router": router,
    "blending": blending,
}


if __name__ == "__main__":
    main()
