"""What adapters of a rank keep of the experts that an artifact stores, without and with baked means.

    python benchmarks/exported_ranks.py BASE --experts DIR --tasks A,B --family NAME --bits 0.15 --work DIR

BASE and the experts are as train_experts.py leaves them. The rows of a family go to results/serving.json, beside those
of other families. What is measured is kept in DIR, so the command may be interrupted and repeated. Losses are computed
in bfloat16 where the processor multiplies, as those of training are.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import record
import torch
from artifacts import artifact, source, tasks_of
from peft import PeftModel
from torch.nn.functional import cross_entropy
from train_experts import REPORT_SEED, Pair, answer_logits
from transformers import AutoModelForCausalLM

from mergekit_mediator import MediatorModel
from mergekit_mediator.evaluate.rivals import Rivals, truncated
from mergekit_mediator.export.adapter import write_peft
from mergekit_mediator.export.baked import BAKED, write_baked
from mergekit_mediator.export.experts import StoredExperts
from mergekit_mediator.export.peft_lora import Holdable, to_adapter
from mergekit_mediator.models.loading import load_tokenizer
from mergekit_mediator.models.prompts import render

RANKS = (8, 16, 32, 64, 128)
# By reference, whether the mean is baked into the model that is served. The dense expert of `mean` is it already.
SERVED = {"base": (False, True), "mean": (False,)}
_BATCH = 8

Loss = tuple[float, float]
Losses = dict[str, Loss]


@torch.no_grad()
def losses(model: Any, pairs: Sequence[Pair]) -> Loss:
    """The mean loss of answers in nats a token, and the part of answers that greedy decoding gives."""
    total = tokens = right = 0.0
    for start in range(0, len(pairs), _BATCH):
        batch = list(pairs[start : start + _BATCH])
        logits, targets, rows = answer_logits(model, batch)
        total += float(cross_entropy(logits, targets, reduction="sum"))
        tokens += len(targets)
        right += len(batch) - len(rows[logits.argmax(-1) != targets].unique())
    return total / tokens, right / len(pairs)


class Measured:
    """Figures that are measured once and kept in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._figures = json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, key: str, measure: Callable[[], Any]) -> Any:
        if key not in self._figures:
            self._figures[key] = measure()
            self._path.write_text(json.dumps(self._figures, indent=1))
            print(key, self._figures[key], flush=True)
        return self._figures[key]


def _loaded(path: Path | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def _plain(path: Path | str, pairs: Sequence[Pair]) -> Loss:
    """The loss of a checkpoint in float32."""
    return losses(_loaded(path), pairs)


def _adapted(path: Path | str, adapter: Path, pairs: Sequence[Pair]) -> Loss:
    """The loss of a checkpoint in float32 with an adapter beside its weights.

    It is not merged: a tied embedding has an adapter as embedding and as head, and would get the change twice.
    """
    return losses(PeftModel.from_pretrained(_loaded(path), adapter).base_model.model, pairs)


def rows(
    made: Rivals,
    pairs: dict[str, list[Pair]],
    ranks: dict[str, Sequence[int]],
    extract_ranks: Sequence[int],
    family: str,
    stored_as: dict[str, Any],
    work: Path,
) -> Iterator[dict[str, Any]]:
    """For each reference and rank, without and with the baked mean: means over the experts.

    `gain_kept` is (base's loss - adapter's loss) / (base's loss - stored expert's loss), and `answers_kept`
    the right answers of the adapters over those of the stored experts.
    """
    work.mkdir(parents=True, exist_ok=True)
    measured = Measured(work / f"{family}.json")
    of_base = {n: measured(f"base {n}", partial(_plain, made.base, pairs[n])) for n in pairs}
    extracted = _extracted(made, pairs, extract_ranks, measured)
    for reference, bakings in SERVED.items():
        if not ranks[reference]:
            continue
        parameters = {"route": "all", "reference": reference, **stored_as}
        model, _ = artifact(made, f"{family}-{reference}", parameters)
        stored = {
            n: measured(f"{reference} stored {n}", partial(_stored, model, n, pairs[n]))
            for n in pairs
        }
        experts, holdable = StoredExperts(model.root), Holdable.of(model.root)
        baked = work / f"{family}-{reference}-baked"
        if True in bakings and not (baked / BAKED).exists():
            write_baked(experts, tuple(pairs), holdable.unheld(experts), baked)
        for rank in ranks[reference]:
            folders, told = _adapters(experts, holdable, pairs, rank, measured, work / family)
            for is_baked in bakings:
                root = baked / BAKED if is_baked else model.root
                scores = {
                    n: measured(
                        f"{reference} rank {rank}{' baked' * is_baked} {n}",
                        partial(_adapted, root, folders[n], pairs[n]),
                    )
                    for n in pairs
                }
                row = {
                    "family": family,
                    "storage": stored_as,
                    "reference": reference,
                    "baked": is_baked,
                    "rank": rank,
                    **told,
                    **_kept(of_base, scores, stored),
                    "extract_lora_gain_kept": None,
                    "prompts": len(next(iter(pairs.values()))),
                }
                if rank in extracted:
                    kept = _kept(of_base, extracted[rank], stored)
                    row |= {f"extract_lora_{name}": value for name, value in kept.items()}
                yield row


def _stored(model: MediatorModel, name: str, pairs: list[Pair]) -> Loss:
    """The loss of an expert as the artifact stores it."""
    with model.mixture(name) as mixed:
        return losses(mixed, pairs)


def _adapters(
    experts: StoredExperts,
    holdable: Holdable,
    names: Sequence[str] | dict[str, Any],
    rank: int,
    measured: Measured,
    work: Path,
) -> tuple[dict[str, Path], dict[str, Any]]:
    """Export the experts; their folders, and the largest rank, the worst error and the number of weights left out."""
    folders, figures = {}, []
    for name in names:
        folder = work / f"{experts.root.name}-{rank}-{name}"

        export = partial(_export, experts, holdable, name, rank, folder)
        figures.append(measured(f"{experts.root.name} exported {rank} {name}", export))
        folders[name] = folder
    ranks, errors, dropped = zip(*figures, strict=True)
    told = {"largest_rank": max(ranks), "worst_squared_error": max(errors)}
    return folders, {**told, "weights_left_out": max(dropped)}


def _export(
    experts: StoredExperts, holdable: Holdable, name: str, rank: int, folder: Path
) -> list[float]:
    """Write an expert's adapter; its rank, its squared error and the number of weights that it leaves out."""
    adapter = to_adapter(experts, {name: 1.0}, rank, holdable)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    write_peft(adapter, folder, str(experts.root), torch.float32)
    return [adapter.rank, adapter.squared_error, len(adapter.dropped)]


def _extracted(
    made: Rivals, pairs: dict[str, list[Pair]], ranks: Sequence[int], measured: Measured
) -> dict[int, Losses]:
    """The losses of what `mergekit-extract-lora` takes out of each expert; smaller ranks are cut from the largest."""
    result: dict[int, Losses] = {}
    for name in pairs:
        for rank in sorted(ranks, reverse=True):
            extract = partial(_extracted_loss, made, name, rank, max(ranks), pairs[name])
            loss = measured(f"extract-lora {rank} {name}", extract)
            result.setdefault(rank, {})[name] = loss
    return result


def _extracted_loss(
    made: Rivals, name: str, rank: int, largest: int, pairs: Sequence[Pair]
) -> Loss:
    """The loss of the base with what `mergekit-extract-lora` takes out of an expert.

    It is merged: a tied embedding has one adapter, and the head changes with it.
    """
    folder, _ = made.adapter(name, made.base, largest, "extracted")
    cut = folder if rank == largest else truncated(folder, rank)
    return losses(PeftModel.from_pretrained(_loaded(made.base), cut).merge_and_unload(), pairs)


def _kept(base: Losses, scores: Losses, stored: Losses) -> dict[str, float]:
    """Means over experts of what is kept of the gain and of the answers."""
    gains = [(base[n][0] - scores[n][0]) / (base[n][0] - stored[n][0]) for n in scores]
    right = sum(score[1] for score in scores.values()) / sum(score[1] for score in stored.values())
    return {"gain_kept": sum(gains) / len(gains), "answers_kept": right}


def with_other_families(exported: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """These rows in order, and before them those of other families in the results."""
    families = {row["family"] for row in exported}
    there = record.read("serving")["exported"] if record.exists("serving") else []
    others = [row for row in there if row["family"] not in families]
    return [*others, *sorted(exported, key=lambda r: (r["reference"], r["baked"], r["rank"]))]


def answers_of(tokenizer: Any, tasks: dict[str, Any]) -> dict[str, list[Pair]]:
    """Prompts and answers of each expert's task, as token ids."""
    return {
        name: [
            (render(tokenizer, e.prompt), tokenizer(e.answer + tokenizer.eos_token).input_ids)
            for e in task.examples
        ]
        for name, task in tasks.items()
    }


def storage(bits: float | None) -> dict[str, Any]:
    """The parameters of a merge that stores experts in so many bits a parameter, or in the default form."""
    return {} if bits is None else {"bits": bits}


def numbers(text: str) -> list[int]:
    """Numbers that commas separate."""
    return [int(number) for number in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path)
    parser.add_argument("--experts", type=Path, required=True)
    parser.add_argument("--tasks", required=True, help="folders of --experts, separated by commas")
    parser.add_argument("--family", required=True)
    parser.add_argument("--bits", type=float, help="a parameter of each expert; else 10%% of them")
    parser.add_argument("--prompts", type=int, default=16, help="an expert, that are reported on")
    parser.add_argument("--ranks", type=numbers, default=list(RANKS), help="with reference: base")
    parser.add_argument("--mean-ranks", type=numbers, default=[], help="with reference: mean")
    parser.add_argument("--extract-ranks", type=numbers, default=[16, 64])
    parser.add_argument("--work", type=Path, default=Path("serving"))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folders = {name: arguments.experts / name for name in arguments.tasks.split(",")}
    sources = {name: source(arguments.base, folder) for name, folder in folders.items()}
    made = Rivals(str(arguments.base.resolve()), sources, arguments.work / "merges")
    tasks = tasks_of(folders, arguments.prompts, REPORT_SEED)
    pairs = answers_of(load_tokenizer(arguments.base), tasks)
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
    part = f"ranks of {exported[0]['family']}"
    figures = {"exported": with_other_families(exported)}
    return record.amend("serving", part, figures, {"report": REPORT_SEED})


if __name__ == "__main__":
    main()
