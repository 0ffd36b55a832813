"""What does each part of the method do?

    python benchmarks/train_experts.py --family strong4 --out experts
    python benchmarks/ablations.py --family strong4 --experts experts

One table on the same prompts, each task with its own expert unless a row says otherwise: Mediator within
a budget, the same without one part at a time, selections of layers by each metric with their controls,
and each way of storing. Scores and merges in the work folder are used again. Writes
results/ablations.json.
"""

from __future__ import annotations

import argparse
import random
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import record
import torch
from artifacts import DTYPE, artifact, source, tasks_of
from train_experts import DRAW, FAMILIES, REPORT_SEED

from mergekit_mediator import MediatorModel
from mergekit_mediator.delta.approximate import approximate
from mergekit_mediator.evaluate.contenders import Contender, mixed
from mergekit_mediator.evaluate.results import SystemResult, to_json
from mergekit_mediator.evaluate.rivals import Rivals
from mergekit_mediator.evaluate.scorer import Scorer, Tasks
from mergekit_mediator.evaluate.systems import base_system, expert_systems, route, sizes
from mergekit_mediator.merge.experts import encode
from mergekit_mediator.merge.layers import nearest_middle

BUDGET = {"budget": "1.0595x"}
METRICS = ("sign", "mass", "dispersion")
RANDOM_CHOICES = 2
PARTS = ("parts", "layers", "stored", "reference", "strength")
# What experts keep of routed layers where layers are compared.
PLAIN = {"density": 0.1, "values": "exact"}
STORED: dict[str, dict[str, Any]] = {
    "exact, density 0.1": {"density": 0.1, "values": "exact"},
    "exact, density 1 (without sparsity)": {"density": 1.0, "values": "exact"},
    "int8, density 0.1": {"density": 0.1, "values": "int8"},
    "int4, density 0.1": {"density": 0.1, "values": "int4"},
    "sign, density 1": {"density": 1.0, "values": "sign"},
    "low rank plus sparse, bits: 0.15": {"bits": 0.15},
    "low rank plus sparse, bits: 1": {"bits": 1},
}


class Ablations:
    """Rows of the table, scored as they are asked for."""

    def __init__(self, made: Rivals, scorer: Scorer, tasks: Tasks, report_seed: int) -> None:
        self.made, self.scorer, self.tasks = made, scorer, tasks
        self._report_seed = report_seed
        self.results: list[SystemResult] = [
            base_system(scorer, tasks, made.base),
            *expert_systems(scorer, tasks, made.experts, each=False),
        ]

    def add(self, part: str, name: str, parameters: dict[str, Any]) -> None:
        """One merge, each task with its own expert."""
        model = self._merged(parameters)
        own = {t: [mixed(model, {t: 1.0})] * len(x.examples) for t, x in self.tasks.items()}
        self.add_of(model, part, name, parameters, own)

    def _merged(self, parameters: dict[str, Any]) -> MediatorModel:
        label = "mediator" if parameters == BUDGET else "-".join(map(str, parameters.values()))
        model, _ = artifact(self.made, label, parameters)
        return model

    def add_of(
        self,
        model: MediatorModel,
        part: str,
        name: str,
        parameters: dict[str, Any],
        answering: dict[str, list[Contender]],
    ) -> None:
        """An artifact, and under which mixture it answers each prompt."""
        scores = self.scorer.score(name, self.tasks, answering)
        layers = sum(layer.routed for layer in model.manifest.layers)
        figures = {"part": part, "parameters": parameters, "routed_layers": layers}
        self.results.append(
            SystemResult(
                name, scores, {**sizes(MediatorModel.from_pretrained(model.root))[1], **figures}
            )
        )
        self.write()

    def write(self) -> Path:
        """What is known by now, with the rows of earlier runs."""
        prompts = {task: len(t.examples) for task, t in self.tasks.items()}
        known = record.read("ablations")["rows"] if record.exists("ablations") else {}
        figures = {"prompts": prompts, "rows": known | to_json(self.results)}
        return record.write("ablations", figures, {"report": self._report_seed})

    def parts(self) -> None:
        """Mediator, and without one part at a time."""
        model, _ = artifact(self.made, "mediator", BUDGET)
        for name, policy in (("mediator", "auto"), ("without uncertainty: policy hard", "hard")):
            model.policy = policy
            routed = {
                task: [mixed(model, mixture) for mixture in found.mixtures]
                for task, found in route(model, self.tasks).items()
            }
            self.add_of(model, "parts", name, BUDGET, routed)
        dense = {task: [mixed(model, {})] * len(x.examples) for task, x in self.tasks.items()}
        self.add_of(model, "parts", "without routing: the dense expert", BUDGET, dense)
        self.add("parts", "with the task's own expert", BUDGET)

    def layers(self) -> None:
        """Which layers: as `auto` finds; and a third of the blocks, of most or least conflict or at random.

        Blocks are of one size, so that every third of them costs the same bytes.
        """
        blocks: dict[str, float] = {}
        for metric in METRICS:
            parameters = {"route": "auto", "conflict": metric, **PLAIN}
            self.add("layers", f"route: auto by {metric}", parameters)
            layers = self._merged(parameters).manifest.layers
            blocks = {x.name: x.conflict[metric] for x in layers if x.name.isdigit()}
            third = round(len(blocks) / 3)
            ordered = sorted(blocks, key=lambda name: -blocks[name])
            self._explicit(f"{third} blocks of most {metric}", ordered[:third])
            self._explicit(f"{third} blocks of least {metric}", ordered[-third:])
        by_place = nearest_middle(list(blocks))
        self._explicit(f"{third} blocks nearest the middle", by_place[:third])
        self._explicit(f"{third} blocks farthest from it", by_place[-third:])
        for seed in range(RANDOM_CHOICES):
            chosen = random.Random(seed).sample(sorted(blocks), third)
            self._explicit(f"{third} blocks at random, seed {seed}", chosen)

    def _explicit(self, name: str, layers: list[str]) -> None:
        chosen = ",".join(sorted(layers, key=int))
        self.add("layers", name, {"routed_layers": chosen, **PLAIN})

    def reference(self) -> None:
        """Without averaging: experts relative to the base."""
        name = "without averaging: relative to the base"
        self.add("parts", name, {**BUDGET, "reference": "base"})

    def strength(self) -> None:
        """Stored forms that are not strengthened for the part that they lack."""
        parameters = {**BUDGET, "strength": "none"}
        with patch.object(encode, "approximate", partial(approximate, norm_power=0.0)):
            model, _ = artifact(self.made, "-".join(parameters.values()), BUDGET)
        own = {t: [mixed(model, {t: 1.0})] * len(x.examples) for t, x in self.tasks.items()}
        self.add_of(model, "parts", "without strengthening what is kept", parameters, own)

    def stored(self) -> None:
        """All layers routed, each way of storing."""
        for name, parameters in STORED.items():
            self.add("stored", name, {"route": "all", **parameters})


def main() -> None:
    parser = argparse.ArgumentParser(description="What does each part of the method do?")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="strong4")
    parser.add_argument("--tasks", help="these experts instead, separated by commas")
    parser.add_argument(
        "--experts", type=Path, default=Path("experts"), help="train_experts' --out"
    )
    parser.add_argument("--base", type=Path, help="checkpoint directory of the base model")
    parser.add_argument("--work", type=Path, help="where merges and scores are kept")
    parser.add_argument("--prompts", type=int, default=64, help="prompts a task")
    parser.add_argument("--draw", type=int, default=0, help="train_experts' --draw")
    parser.add_argument("--part", choices=PARTS, action="append", help="these rows only")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = args.tasks.split(",") if args.tasks else FAMILIES[args.family]
    base = args.base or args.experts / "base"
    folders = {name: args.experts / name for name in names}
    work = args.work or args.experts / "work" / f"{len(names)}"
    made = Rivals(str(base), {n: source(base, folder) for n, folder in folders.items()}, work)
    model, _ = artifact(made, "mediator", BUDGET)
    scorer = Scorer(model.tokenizer, work / "scores.json", dtype=DTYPE)
    report_seed = REPORT_SEED + DRAW * args.draw
    tasks = tasks_of(folders, args.prompts, report_seed)
    table = Ablations(made, scorer, tasks, report_seed)
    for part in args.part or PARTS:
        getattr(table, part)()
    path = table.write()
    print(f"written to {path}")


if __name__ == "__main__":
    main()
