"""What adapters of a rank keep of the experts that an artifact stores, beside `mergekit-extract-lora` of the rank.

    python benchmarks/exported_ranks.py BASE --experts DIR --family strong4 --bits 0.15 --work DIR

BASE is a directory, or `smollm2` or `gemma`, and the experts are as train_experts.py leaves them. The rows of a family
go to results/serving.json, beside those of other families. What is measured is kept in DIR, so the command may be
interrupted and repeated. Losses are computed in bfloat16 where the processor multiplies, as those of training are.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import exported_losses as measure
import record
import torch
from artifacts import artifact, source, tasks_of
from base_models import GGUF_FILES, make_base
from exported_losses import Losses, Measured
from train_experts import FAMILIES, REPORT_SEED, Pair

from mergekit_mediator.evaluate.rivals import Rivals
from mergekit_mediator.export.adapter import write_peft
from mergekit_mediator.export.auto_rank import least_rank
from mergekit_mediator.export.baked import BAKED, write_baked
from mergekit_mediator.export.experts import StoredExperts
from mergekit_mediator.export.peft_lora import Holdable, to_adapter
from mergekit_mediator.export.rank import AUTO_RANKS
from mergekit_mediator.models.loading import load_tokenizer
from mergekit_mediator.models.prompts import render

RANKS = (8, 16, 32, 64, 128)
# The parts of the gain that `--rank auto` is asked to keep.
AUTO = (0.99, 0.995, 0.999)
# By reference, whose norms the served model has: the dense expert's, the mean baked in, or those of the expert itself,
# which no engine can have for several experts. The dense expert of `mean` is the mean already.
NORMS = {"base": ("dense", "mean", "own"), "mean": ("dense", "own")}
Pairs = Mapping[str, list[Pair]]


def rows(
    made: Rivals,
    pairs: Pairs,
    ranks: Mapping[str, Sequence[int]],
    extract_ranks: Sequence[int],
    family: str,
    stored_as: dict[str, Any],
    work: Path,
) -> Iterator[dict[str, Any]]:
    """For each reference, rank and kind of norms: means over the experts.

    `gain_kept` is (base's loss - adapter's loss) / (base's loss - stored expert's loss), and `answers_kept`
    the right answers of the adapters over those of the stored experts.
    """
    work.mkdir(parents=True, exist_ok=True)
    label = "-".join([family, *(f"{key}-{value}" for key, value in stored_as.items())])
    measured = Measured(work / f"{label}.json")
    # The extraction knows nothing of how experts are stored.
    of_family = Measured(work / f"{family}-extracted.json")
    of_base: Losses = {
        n: of_family(f"base {n}", partial(measure.plain, made.base, pairs[n])) for n in pairs
    }
    with_norms, without = (
        _extracted(made, pairs, extract_ranks, of_family, has_norms) for has_norms in (True, False)
    )
    for reference in (name for name in NORMS if ranks[name]):
        exporter = Exporter(made, pairs, label, reference, stored_as, work, measured)
        # the factors of all experts in one adapter make the largest ranks slow
        auto = AUTO if reference == "base" else ()
        for asked in (*ranks[reference], *auto):
            chosen = (
                exporter.chosen(asked) if isinstance(asked, float) else dict.fromkeys(pairs, asked)
            )
            for norms in NORMS[reference]:
                row = {
                    "family": family,
                    "storage": stored_as,
                    "reference": reference,
                    "norms": norms,
                    "rank": max(chosen.values()),
                    "auto": asked if isinstance(asked, float) else None,
                    "ranks": chosen,
                    **exporter.told(chosen),
                    **measure.kept(of_base, exporter.losses(chosen, norms), exporter.stored),
                    "extract_lora_gain_kept": None,
                    "prompts": len(next(iter(pairs.values()))),
                }
                for name, losses in (
                    ("extract_lora", with_norms),
                    ("extract_lora_no_norms", without),
                ):
                    if isinstance(asked, int) and asked in losses:
                        figures = measure.kept(of_base, losses[asked], exporter.stored)
                        row |= {f"{name}_{key}": value for key, value in figures.items()}
                yield row


class Exporter:
    """The experts of an artifact as adapters of each rank that is asked for."""

    def __init__(
        self,
        made: Rivals,
        pairs: Pairs,
        label: str,
        reference: str,
        stored_as: dict[str, Any],
        work: Path,
        measured: Measured,
    ) -> None:
        """Merge the artifact, unless it is there, and measure its experts as they are stored."""
        parameters = {"route": "all", "reference": reference, **stored_as}
        self._model, _ = artifact(made, f"{label}-{reference}", parameters)
        self._pairs, self._reference, self._measured = pairs, reference, measured
        self._experts, self._holdable = (
            StoredExperts(self._model.root),
            Holdable.of(self._model.root),
        )
        self._folder = work / f"{label}-{reference}"
        self.stored: Losses = {
            n: measured(
                f"{reference} stored {n}", partial(measure.stored, self._model, n, pairs[n])
            )
            for n in pairs
        }
        if "mean" in NORMS[reference] and not (self._folder / BAKED).exists():
            unheld = self._holdable.unheld(self._experts)
            write_baked(self._experts, tuple(pairs), unheld, self._folder)

    def chosen(self, keep: float) -> dict[str, int]:
        """The rank that `auto` chooses for each expert, by prediction."""
        ranks = {
            n: self._measured(f"{self._reference} auto {n}", partial(self._auto, n))
            for n in self._pairs
        }
        return {name: of_part[str(keep)] for name, of_part in ranks.items()}

    def told(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        """The largest rank that a module has, the worst squared error and the most weights that are left out."""
        exported = [self._exported(name, rank) for name, rank in ranks.items()]
        largest, errors, dropped = zip(*exported, strict=True)
        return {
            "largest_rank": max(largest),
            "worst_squared_error": max(errors),
            "weights_left_out": max(dropped),
        }

    def losses(self, ranks: Mapping[str, int], norms: str) -> Losses:
        """The loss of each expert's adapter of its rank."""
        return {
            n: self._measured(
                f"{self._reference} rank {rank} norms {norms} {n}",
                partial(self._loss, n, rank, norms),
            )
            for n, rank in ranks.items()
        }

    def _loss(self, name: str, rank: int, norms: str) -> measure.Loss:
        root = self._folder / BAKED if norms == "mean" else self._model.root
        own = measure.norms_of(self._model, name) if norms == "own" else None
        return measure.adapted(root, self._adapter(name, rank), self._pairs[name], own)

    def _adapter(self, name: str, rank: int) -> Path:
        return self._folder / f"{name}-{rank}"

    def _exported(self, name: str, rank: int) -> list[float]:
        """Write an expert's adapter once; its rank, its squared error and the number of weights that it leaves out."""

        def export() -> list[float]:
            adapter = to_adapter(self._experts, {name: 1.0}, rank, self._holdable)
            folder = self._adapter(name, rank)
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
            write_peft(adapter, folder, str(self._model.root), torch.float32)
            return [adapter.rank, adapter.squared_error, len(adapter.dropped)]

        result: list[float] = self._measured(f"{self._reference} exported {rank} {name}", export)
        return result

    def _auto(self, name: str) -> dict[str, int]:
        adapter = to_adapter(self._experts, {name: 1.0}, AUTO_RANKS[-1], self._holdable)
        choices = {keep: least_rank(adapter, keep).choice for keep in AUTO}
        return {str(keep): choice.rank for keep, choice in choices.items() if choice}


def _extracted(
    made: Rivals, pairs: Pairs, ranks: Sequence[int], measured: Measured, has_norms: bool
) -> dict[int, Losses]:
    """The losses of what `mergekit-extract-lora` takes out of each expert; smaller ranks are cut from the largest."""
    result: dict[int, Losses] = {}
    for name in pairs:
        for rank in sorted(ranks, reverse=True):
            key = f"extract-lora {rank}{'' if has_norms else ' without norms'} {name}"
            arguments = (made, name, rank, max(ranks), pairs[name], has_norms)
            result.setdefault(rank, {})[name] = measured(
                key, partial(measure.extracted, *arguments)
            )
    return result


def with_other_families(exported: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """These rows in order, and before them those of other families, or of other storage, in the results."""

    def of(row: dict[str, Any]) -> tuple[str, str]:
        return row["family"], json.dumps(row.get("storage"))

    there = record.read("serving")["exported"] if record.exists("serving") else []
    others = [row for row in there if of(row) not in set(map(of, exported))]
    order = sorted(exported, key=lambda r: (r["reference"], r["norms"], r["auto"] or 0, r["rank"]))
    return [*others, *order]


def answers_of(tokenizer: Any, tasks: dict[str, Any]) -> dict[str, list[Pair]]:
    """Prompts and answers of each expert's task, as token ids."""
    return {
        name: [
            (
                render(tokenizer, e.prompt),
                tokenizer(e.answer + tokenizer.eos_token, add_special_tokens=False).input_ids,
            )
            for e in task.examples
        ]
        for name, task in tasks.items()
    }


def storage(bits: float | None) -> dict[str, Any]:
    """The parameters of a merge that stores experts in so many bits a parameter, or in the default form."""
    return {} if bits is None else {"bits": bits}


def numbers(text: str) -> list[int]:
    """Numbers that commas separate."""
    return [int(number) for number in text.split(",") if number]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", help=f"a directory, or one of {', '.join(GGUF_FILES)}")
    parser.add_argument("--experts", type=Path, required=True)
    parser.add_argument("--tasks", help="folders of --experts, with commas; else those of --family")
    parser.add_argument("--family", required=True, help=f"{', '.join(FAMILIES)}, or any name")
    parser.add_argument("--bits", type=float, help="a parameter of each expert; else 10%% of them")
    parser.add_argument("--prompts", type=int, default=16, help="an expert, that are reported on")
    parser.add_argument("--ranks", type=numbers, default=list(RANKS), help="with reference: base")
    parser.add_argument("--mean-ranks", type=numbers, default=[], help="with reference: mean")
    parser.add_argument("--extract-ranks", type=numbers, default=list(RANKS))
    parser.add_argument("--work", type=Path, default=Path("serving"))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if not (arguments.tasks or arguments.family in FAMILIES):
        parser.error(f"--family {arguments.family}: --tasks is required")
    torch.set_num_threads(arguments.threads)
    base = Path(arguments.base)
    if arguments.base in GGUF_FILES:
        base = arguments.work / arguments.base
        if not base.exists():
            make_base(arguments.base, base)
    names = arguments.tasks.split(",") if arguments.tasks else FAMILIES[arguments.family]
    folders = {name: arguments.experts / name for name in names}
    sources = {name: source(base, folder) for name, folder in folders.items()}
    made = Rivals(str(base.resolve()), sources, arguments.work / "merges")
    tasks = tasks_of(folders, arguments.prompts, REPORT_SEED)
    pairs = answers_of(load_tokenizer(base), tasks)
    ranks = {"base": arguments.ranks, "mean": arguments.mean_ranks}
    about = (arguments.family, storage(arguments.bits), arguments.work / "exported")
    exported: list[dict[str, Any]] = []
    for row in rows(made, pairs, ranks, [], *about):
        exported.append(row)
        write(exported)
    # An extraction takes a minute an expert, and comes last.
    print(write(list(rows(made, pairs, ranks, arguments.extract_ranks, *about))))


def write(exported: list[dict[str, Any]]) -> Path:
    """Write the rows of a family to the results."""
    stored_as = " ".join(f"{k} {v}" for k, v in exported[0]["storage"].items())
    part = f"ranks of {exported[0]['family']} {stored_as}".rstrip()
    figures = {"exported": with_other_families(exported)}
    return record.amend("serving", part, figures, {"report": REPORT_SEED})


if __name__ == "__main__":
    main()
