"""How fast mixtures are entered, decoded with, and mixed in one batch; and what resident experts take.

    python benchmarks/runtime.py BASE --work DIR

Merges the bundled adapters of BASE twice: `sparse` keeps 10% of every weight, exactly, `low_rank` the
adapters' own factors. Everything that is compared is run in turns in one process, so that
a busy machine slows all of it down alike; a figure is the median over the turns of their ratio.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch
from artifacts import artifact
from timing import in_turns, milliseconds, ratio, seconds

from mergekit_mediator import MediatorModel
from mergekit_mediator.cli import demo
from mergekit_mediator.evaluate.rivals import Rivals
from mergekit_mediator.models.loading import load_plain
from mergekit_mediator.serve.mixer import Mixer
from mergekit_mediator.serve.residency import Experts

KINDS: dict[str, dict[str, Any]] = {
    "sparse": {"route": "all", "density": 0.1},
    "low_rank": {"route": "all"},
}

PROMPTS = (
    "What is 12 + 30 - 7?",
    "Alice is the mother of Bob. What is Alice to Bob?",
    "Reverse the order of these words: house, river, stone, light",
    'How many times does the letter "a" appear in the text: "a banana and a pear"?',
)


def read(root: Path) -> None:
    """Load a checkpoint, and read from every cache line of it: transformers only maps the file."""
    for weight in load_plain(root).parameters():
        weight.view(-1)[:: 64 // weight.element_size()].sum()


def enter_figures(model: MediatorModel, root: Path, rounds: int) -> dict[str, Any]:
    """Entering a resident expert against adding a dense change to the weights that it changes, loading
    a checkpoint, and PEFT; and leaving it."""
    names = model.experts[:2]
    changed = [
        n for n, s in model._mixer.placer.expert(names[0]).items() if len(s.codes) or s.factors
    ]
    weights = [model._mixer.placer.weights[name].clone() for name in changed]
    changes = [torch.full_like(w, 1e-3) for w in weights]
    turn = iter(range(10**6))
    left: list[float] = []

    def add() -> None:
        for weight, change in zip(weights, changes, strict=True):
            weight.add_(change)

    def enter() -> float:
        context = model.mixture({names[next(turn) % 2]: 1.0})
        took = seconds(context.__enter__)
        left.append(seconds(lambda: context.__exit__(None, None, None)))
        return took

    expert_bytes = model.manifest.files[f"mediator/experts/{names[0]}.safetensors"].bytes
    set_adapter, rank = peft_switch(root, expert_bytes)
    times = in_turns(
        rounds,
        enter=enter,
        leave=lambda: left[-1],
        dense_add=lambda: seconds(add),
        peft=set_adapter,
        from_pretrained=lambda: seconds(lambda: load_plain(root)),
        load=lambda: seconds(lambda: read(root)),
    )
    return {
        "enter_over_dense_add": ratio(times, "enter", "dense_add"),
        "leave_over_dense_add": ratio(times, "leave", "dense_add"),
        "enter_speedup_over_load": ratio(times, "load", "enter"),
        "enter_speedup_over_from_pretrained_alone": ratio(times, "from_pretrained", "enter"),
        "enter_over_peft": ratio(times, "enter", "peft"),
        "peft_rank": rank,
        "expert_file_bytes": expert_bytes,
        "milliseconds": milliseconds(times),
    }


def peft_switch(root: Path, size: int) -> tuple[Callable[[], float], int]:
    """Times `set_adapter` and `merge_adapter` of a LoRA of as many bytes as an expert's file."""
    from peft import LoraConfig, get_peft_model

    plain = load_plain(root)
    linear = [
        m for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n
    ]
    per_rank = sum(m.in_features + m.out_features for m in linear) * 2
    rank = max(1, round(size / per_rank))
    config = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(plain, config, adapter_name="a", autocast_adapter_dtype=False)
    model.add_adapter("b", config)
    model.to(torch.bfloat16)
    turn = iter(range(10**6))

    def switch() -> float:
        name = "ab"[next(turn) % 2]

        def both() -> None:
            model.set_adapter(name)
            model.merge_adapter()

        took = seconds(both)
        model.unmerge_adapter()
        return took

    return switch, rank


def decode_figures(model: MediatorModel, root: Path, rounds: int, tokens: int) -> dict[str, Any]:
    """Decoding inside a mixture against the plain dense model."""
    plain: Any = load_plain(root)
    ids, mask = model.tokenize(PROMPTS[:1])
    options: dict[str, Any] = {
        "attention_mask": mask,
        "do_sample": False,
        "min_new_tokens": tokens,
        "max_new_tokens": tokens,
    }

    def mixed() -> float:
        with model.mixture({model.experts[0]: 1.0}):
            return seconds(lambda: model.generate(ids, **options))

    times = in_turns(
        rounds, dense=lambda: seconds(lambda: plain.generate(ids, **options)), mixed=mixed
    )
    return {
        "decode_over_dense": ratio(times, "dense", "mixed"),
        "milliseconds": milliseconds(times),
    }


def batch_figures(model: MediatorModel, rounds: int, tokens: int) -> dict[str, Any]:
    """Eight rows over four experts: in rows form, and one mixture after the other."""
    ids, mask = model.tokenize([p for p in PROMPTS for _ in range(2)])
    mixture = [name for name in model.experts[:4] for _ in range(2)]

    def run(apply: Any) -> float:
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": tokens}
        options["min_new_tokens"] = tokens
        return seconds(lambda: model.generate(ids, mask, mixture=mixture, apply=apply, **options))

    times = in_turns(rounds, merge=lambda: run("merge"), rows=lambda: run("rows"))
    return {
        "mixed_batch_speedup": ratio(times, "merge", "rows"),
        "milliseconds": milliseconds(times),
    }


def form_figures(model: MediatorModel, rounds: int) -> list[dict[str, Any]]:
    """One request in rows form against its mixture in place, for short and long answers; and which of
    the two `auto` takes."""
    ids, mask = model.tokenize(PROMPTS[:1])
    figures = []
    for tokens in (4, 16, 64):
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": tokens}
        options["min_new_tokens"] = tokens

        def run(apply: Any, options: Any = options) -> float:
            chosen = {"mixture": model.experts[0], "apply": apply, **options}
            return seconds(lambda: model.generate(ids, mask, **chosen))

        times = in_turns(rounds, merge=lambda: run("merge"), rows=lambda: run("rows"))
        rows = (model._choice.named(model.experts[0]),)
        auto = model._serving._form(rows, "auto", None, ids.shape[1], tokens)
        row = {"new_tokens": tokens, "auto": auto, "milliseconds": milliseconds(times)}
        figures.append({**row, "rows_over_merge": ratio(times, "rows", "merge")})
    return figures


def memory_figures(model: MediatorModel, counts: tuple[int, ...]) -> list[dict[str, int]]:
    """What experts take once each was in place, each of the artifact counted as often as needed:
    decoded alone, as in rows form, and with the dense weights that are kept to enter them faster."""
    files = list(model._mixer.experts.files.values())
    dense = sum(w.numel() * w.element_size() for w in model.model.parameters())
    rows = []
    for count in counts:
        copies = {f"e{i}": files[i % len(files)] for i in range(count)}
        mixer = Mixer(model.model, Experts(copies, model._mixer.experts.dense))
        for name in copies:
            with mixer.mixture({name: 1.0}):
                pass
        decoded, resident = mixer.experts.resident_bytes, mixer.resident_bytes
        row = {"decoded_bytes": decoded, "resident_bytes": resident, "dense_bytes": dense}
        rows.append({"experts": count, **row})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="where merges are kept")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    args = parser.parse_args()
    torch.manual_seed(7)
    figures: dict[str, Any] = {
        "threads": args.threads,
        "rounds": args.rounds,
        "load_average": round(os.getloadavg()[0], 1),
        "tokens": args.tokens,
    }
    base = args.base.resolve()
    adapters = {path.parent.name: path.parent for path in demo.ADAPTERS.glob("*/skill.json")}
    made = Rivals(str(base), {n: f"{base}+{p}" for n, p in sorted(adapters.items())}, args.work)
    for kind, parameters in KINDS.items():
        model, _ = artifact(made, kind, parameters)
        root = model.root
        figures[kind] = {"threads": {}}
        with torch.no_grad():
            for threads in args.threads:
                torch.set_num_threads(threads)
                figures[kind]["threads"][str(threads)] = {
                    "enter": enter_figures(model, root, args.rounds),
                    "decode": decode_figures(model, root, args.rounds, args.tokens),
                    "batch": batch_figures(model, max(3, args.rounds // 3), args.tokens),
                    "forms": form_figures(model, max(3, args.rounds // 3)),
                }
            figures[kind]["memory"] = memory_figures(model, (4, 8, 16))
        print(kind, figures[kind], flush=True)
    most = figures["sparse"]["threads"][str(args.threads[-1])]
    for part in ("enter", "decode", "batch"):
        figures |= {k: v for k, v in most[part].items() if "over" in k or "speedup" in k}
    print(record.write("runtime", figures, {"torch": 7}))


if __name__ == "__main__":
    main()
