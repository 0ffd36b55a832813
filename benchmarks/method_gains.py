"""How much of the gain of broad fine-tunes does every static merge method keep?

    python benchmarks/heavy.py --out heavy --part train --kind python --kind german --kind reasoning
    python benchmarks/method_gains.py --experts heavy --kind python --kind german --kind reasoning

The gain of an expert is the way from the base's nats per token of held-out text of its kind (0) to its own (100).
Every method merges with two or three usual coefficients; those that do best on some held-out rows are measured on
others. Methods with prompts get beginnings of rows that the experts were trained on, which the experts continue,
without a chat template. `rcp` keeps the expert of reasoning tasks whole. Methods that store
experts are not routed: each text is read by its own expert. Rows of these methods and of this label in
results/methods.json are replaced, and all others stay. Merges in the work folder are used again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import heavy_texts
import mergekit.merge_methods  # noqa: F401 (before the package, so that the start-up hook completes it)
import record
import torch
from baselines import State, load
from heavy import held_out
from heavy_texts import ROW, Rows
from heavy_training import RECIPES
from method_artifacts import STORED, stored
from method_quality import RCP, TRIALS, merges, write
from rates import Nats
from trained_parts import SEED
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_mediator.evaluate.rivals import Rivals
from mergekit_mediator.evaluate.trials import Trial

REASONING = "reasoning"
BEGINNING = 64  # tokens of a prompt
# of adapters, and of texts that experts write in place of prompts
LEFT_OUT = ("lora_lego", "regmean_pp_own_texts")


class Gains:
    """The gain that weights keep, by expert, in percent, on some rows of each expert's kind of text."""

    def __init__(
        self, model: Any, rows: Mapping[str, Rows], base: Path, experts: Mapping[str, Path]
    ):
        self._nats: dict[str, Nats] = {n: held_out(model, own, "cpu") for n, own in rows.items()}
        weights = load(base)
        self._base = {name: nats(weights) for name, nats in self._nats.items()}
        self._own = {name: nats(load(experts[name])) for name, nats in self._nats.items()}

    def of(self, weights_of: Callable[[str], State]) -> list[float]:
        """The gain of each expert that its weights keep."""
        return [
            100 * (nats(weights_of(name)) - self._base[name]) / (self._own[name] - self._base[name])
            for name, nats in self._nats.items()
        ]

    def of_checkpoint(self, folder: Path) -> list[float]:
        """The gain of each expert that a merged checkpoint keeps."""
        weights = load(folder)
        return self.of(lambda _: weights)


def without_template(folder: Path, out: Path) -> str:
    """A copy of a checkpoint by links, whose tokenizer has no chat template: these experts read plain text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(out)
    for file in (*folder.glob("*.safetensors"), folder / "config.json"):
        if not (out / file.name).exists():
            (out / file.name).symlink_to(file.resolve())
    return str(out.resolve())


def beginnings(rows: Rows, count: int, tokenizer: Any, file: Path) -> Path:
    """Write the beginnings of some rows as prompts."""
    texts = [tokenizer.decode(row[:BEGINNING]) for row in rows[:count]]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps({"prompt": text}) for text in texts), encoding="utf-8")
    return file


def static_row(
    method: str, trials: Iterator[Trial], tuning: Gains, report: Gains
) -> dict[str, Any]:
    """What the merge keeps that is best on the tuning rows."""
    scored = [(tuning.of_checkpoint(trial.folder), trial) for trial in trials]
    _, chosen = max(scored, key=lambda one: sum(one[0]))
    return {
        "method": method,
        **summary("normalized", report.of_checkpoint(chosen.folder)),
        "coefficients": chosen.label.removeprefix(method).strip(),
        "tried": len(scored),
        "merge_cpu_seconds": round(chosen.seconds, 1),
    }


def stored_row(made: Rivals, name: str, files: Mapping[str, Path], report: Gains) -> dict[str, Any]:
    """What experts keep as an artifact gives them back, and what its dense expert keeps."""
    model, figures = stored(made, name, files)

    def weights_of(mixture: dict[str, float]) -> State:
        with model.mixture(mixture) as mixed:
            return {key: weight.clone() for key, weight in mixed.state_dict().items()}

    own = report.of(lambda expert: weights_of({expert: 1.0}))
    dense = report.of(lambda _: weights_of({}))
    return {"method": name, **summary("normalized", own), **summary("dense", dense), **figures}


def summary(part: str, gains: list[float]) -> dict[str, Any]:
    """The mean and the worst of gains, and each."""
    rounded = [round(gain, 1) for gain in gains]
    mean = round(sum(gains) / len(gains), 1)
    return {f"{part}_mean": mean, f"{part}_worst": min(rounded), f"{part}_gains": rounded}


def main() -> None:
    parser = argparse.ArgumentParser(description="What do merge methods keep of broad fine-tunes?")
    parser.add_argument("--experts", type=Path, default=Path("heavy"), help="heavy.py's --out")
    parser.add_argument("--kind", choices=list(RECIPES), action="append", required=True)
    parser.add_argument("--label", default="heavy", help="what to call the experts in the results")
    parser.add_argument("--work", type=Path, help="where merges are kept")
    parser.add_argument("--rows", type=int, default=16, help=f"of {ROW} tokens an expert, reported")
    parser.add_argument("--tuning-rows", type=int, default=4)
    parser.add_argument("--asked", type=int, default=16, help="prompts of an expert, for methods")
    known = [name for name in TRIALS if name not in LEFT_OUT]
    parser.add_argument("--method", action="append", choices=[*known, RCP, *STORED])
    args = parser.parse_args()
    wanted = args.method or [*known, *[RCP] * (REASONING in args.kind), *STORED]
    torch.set_num_threads(1)
    work = args.work or args.experts / "work" / "methods"
    folders = {name: args.experts / name for name in args.kind}
    plain = {
        name: without_template(folder, work / "plain" / name) for name, folder in folders.items()
    }
    made = Rivals(without_template(args.experts / "base", work / "plain/base"), plain, work)
    tokenizer = AutoTokenizer.from_pretrained(args.experts / "base")
    notes = [json.loads((folder / "expert.json").read_text()) for folder in folders.values()]
    texts = {
        name: heavy_texts.rows(RECIPES[name].text, tokenizer, 1, args.experts / "texts", [])
        for name in folders
    }
    files = {
        name: beginnings(train, args.asked, tokenizer, work / f"asked/{name}.jsonl")
        for name, (train, _) in texts.items()
    }
    model = AutoModelForCausalLM.from_pretrained(args.experts / "base", dtype=torch.float32)
    model.eval().requires_grad_(False)
    report, tuning = (
        Gains(
            model,
            {name: held[part] for name, (_, held) in texts.items()},
            args.experts / "base",
            folders,
        )
        for part in (slice(args.rows), slice(-args.tuning_rows, None))
    )
    how = record.made({"train": SEED}) | {
        "experts": len(folders),
        "tokens_of_experts": [note["tokens"] for note in notes],
        "rows_per_expert": args.rows,
        "tuning_rows_per_expert": args.tuning_rows,
        "prompts_of_methods": args.asked,
    }
    rows: list[dict[str, Any]] = []
    for method in wanted:
        rows.append(
            stored_row(made, method, files, report)
            if method in STORED
            else static_row(method, merges(made, method, files, REASONING), tuning, report)
        )
        print(rows[-1], flush=True)
        path = write(args.label, rows, how)
    print(path)


if __name__ == "__main__":
    main()
