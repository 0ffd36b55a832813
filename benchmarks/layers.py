"""What predicts the gain of routing a layer?

    python benchmarks/train_experts.py --family strong4 --out experts
    python benchmarks/layers.py --base BASE --experts experts --tasks A,B,C --family strong4

Gain is the share of the loss (nats per answer token) between the average and the experts that goes
when only one layer is routed, exactly; `lost` is what goes missing when all layers but that one are.
Gains are rank-correlated with metrics that need no answers, and each metric chooses a third of
the blocks, of most and of least; blocks are of one size, so all choices cost the same bytes. Losses
are kept in the work folder. Results are added to results/layers.json, family by family.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import layer_metrics
import layer_plots
import record
import torch
from artifacts import DTYPE
from baselines import State, average, expert, load, task_config
from layer_gains import Layers, Losses, layer_names, recovered
from layer_metrics import Profile
from scipy.stats import spearmanr
from train_experts import REPORT_SEED, Pair, tokenised
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_mediator.merge.layers import Selection, select_routed

CALIBRATION_SEED, CALIBRATION_PROMPTS = 200_000, 6
TEXT_SEED, TEXT_TOKENS = 5, 96
RANDOM_CHOICES = 5
# Metrics that a configuration may name, for what `route: auto` makes of them.
OFFERED = ("sign, denoise 0.2", "mass", "dispersion")
DRAWN = ("sign, denoise 0.2", "mass", "last state, prompts")


class Family:
    """Experts of one base on their tasks."""

    def __init__(self, base: Path, experts: Path, tasks: list[str]) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.base = load(base)
        self.experts = {task: expert(self.base, experts / task) for task in tasks}
        self.configs = {task: task_config(experts / task) for task in tasks}
        self._folder = base

    def model(self, state: State) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self._folder, dtype=DTYPE).eval()
        model.load_state_dict(state, strict=False)  # the tied head is not in it
        model.tie_weights()
        return model

    def pairs(self, task: str, seed: int, count: int) -> list[Pair]:
        return tokenised(self.tokenizer, task, self.configs[task], seed, count)


def own_texts(family: Family, model: Any, count: int) -> list[list[int]]:
    """What the model says when asked nothing: token ids."""
    torch.manual_seed(TEXT_SEED)
    start = torch.full((count, 1), family.tokenizer.bos_token_id)
    texts = model.generate(
        start, do_sample=True, min_new_tokens=TEXT_TOKENS, max_new_tokens=TEXT_TOKENS
    )
    found: list[list[int]] = texts.tolist()
    return found


def profiles_of(family: Family, dense: Any) -> dict[str, Profile]:
    """Every metric of every layer."""
    found = layer_metrics.of_weights(family.base, list(family.experts.values()))
    models = {task: family.model(state) for task, state in family.experts.items()}
    prompts = {
        task: [p for p, _ in family.pairs(task, CALIBRATION_SEED, CALIBRATION_PROMPTS)]
        for task in models
    }
    base = family.model(family.base)
    texts = dict.fromkeys(models, own_texts(family, base, CALIBRATION_PROMPTS))
    for source, reader, read in (("prompts", None, prompts), ("own text", base, texts)):
        for metric, profile in layer_metrics.of_activations(reader, dense, models, read).items():
            found[f"{metric}, {source}"] = profile
    return found


def of_place(layers: Sequence[str]) -> dict[str, Profile]:
    """Profiles that look at no weight: how deep a layer is, and how near the middle."""
    depth = {layer: float(place) for place, layer in enumerate(layers)}
    middle = (len(layers) - 1) / 2
    return {"depth": depth, "middle": {x: -abs(place - middle) for x, place in depth.items()}}


def third(profile: Profile, most: bool = True) -> Layers:
    """The third of the blocks with most, or least, of a metric."""
    blocks = sorted(filter(str.isdigit, profile), key=lambda block: profile[block])
    count = len(blocks) // 3
    return frozenset(blocks[-count:] if most else blocks[:count])


def random_thirds(blocks: Iterable[str]) -> list[Layers]:
    draw, blocks = random.Random(0), list(blocks)
    return [frozenset(draw.sample(blocks, len(blocks) // 3)) for _ in range(RANDOM_CHOICES)]


def rank_correlation(first: Profile, second: Profile, layers: Iterable[str]) -> float:
    """Spearman's, over these layers."""
    pairs = [(first[layer], second[layer]) for layer in layers]
    return round(float(spearmanr(pairs).statistic), 3)


class Gains:
    """What routing gives on the prompts of all tasks."""

    def __init__(self, family: Family, dense: Any, work: Path, seed: int, prompts: int) -> None:
        self.layers = layer_names(dense)
        self.blocks = [layer for layer in self.layers if layer.isdigit()]
        self.everything = frozenset(self.layers)
        self.half = prompts // 2
        self._dense = dense
        self._experts = {task: family.model(state) for task, state in family.experts.items()}
        self.losses = {
            task: Losses(work / f"{task} {seed} {prompts}.json", family.pairs(task, seed, prompts))
            for task in family.experts
        }

    def measure(self, choices: Iterable[Layers]) -> None:
        wanted = {frozenset[str](), self.everything, *choices}
        for task, losses in self.losses.items():
            losses.measure(self._dense, self._experts[task], wanted)
            print(f"{task}: {len(losses.known)} choices of layers scored", flush=True)

    def share(self, routed: Layers, part: slice = slice(None)) -> float:
        """Of the loss between average and experts, the part that is recovered."""
        return round(recovered(self.losses.values(), routed, self.everything, part=part), 4)

    def alone(self, part: slice = slice(None)) -> Profile:
        """By layer, what routing it alone recovers."""
        return {layer: self.share(frozenset({layer}), part) for layer in self.layers}

    def lost(self) -> Profile:
        """By layer, what is missing when all others are routed."""
        return {layer: round(1 - self.share(self.everything - {layer}), 4) for layer in self.layers}


def row_of(gains: Gains, profiles: dict[str, Profile], sizes: dict[str, int]) -> dict[str, Any]:
    """All figures of one family."""
    automatic = {m: select_routed(gains.layers, Selection("auto"), profiles[m]) for m in OFFERED}
    random_choices = random_thirds(gains.blocks)
    single = [frozenset({layer}) for layer in gains.layers]
    gains.measure(
        [*single, *(gains.everything - one for one in single), *random_choices]
        + [third(profile, most) for profile in profiles.values() for most in (True, False)]
        + list(automatic.values())
    )
    alone, lost = gains.alone(), gains.lost()
    best = [third(alone), third(lost)]
    gains.measure(best)
    halves = [gains.alone(slice(None, gains.half)), gains.alone(slice(gains.half, None))]
    shares = [gains.share(chosen) for chosen in random_choices]
    metrics = {}
    for metric, profile in profiles.items():
        metrics[metric] = {
            "profile": profile,
            "rank_correlation": rank_correlation(profile, alone, gains.blocks),
            "rank_correlation_all_layers": rank_correlation(profile, alone, gains.layers),
            "rank_correlation_with_lost": rank_correlation(profile, lost, gains.blocks),
            "most": gains.share(third(profile)),
            "least": gains.share(third(profile, most=False)),
        }
    return {
        "loss": {
            task: {
                "average": round(losses.loss(frozenset()), 4),
                "expert": round(losses.loss(gains.everything), 4),
            }
            for task, losses in gains.losses.items()
        },
        "gain": alone,
        "lost": lost,
        "reliability": rank_correlation(halves[0], halves[1], gains.blocks),
        "best_third": [gains.share(chosen) for chosen in best],
        "random_third": shares,
        "metrics": metrics,
        "auto": {
            metric: {
                "layers": len(routed),
                "parameters": round(sum(sizes[x] for x in routed) / sum(sizes.values()), 3),
                "recovered": gains.share(routed),
            }
            for metric, routed in automatic.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What predicts the gain of routing a layer?")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--experts", type=Path, required=True)
    parser.add_argument("--tasks", required=True, help="folders of experts, separated by commas")
    parser.add_argument("--family", required=True, help="what to call these experts")
    parser.add_argument("--prompts", type=int, default=16, help="of each task")
    parser.add_argument("--seed", type=int, default=REPORT_SEED)
    parser.add_argument("--work", type=Path, help="where losses are kept")
    parser.add_argument("--name", default="layers", help="of the file of results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    tasks = args.tasks.split(",")
    family = Family(args.base, args.experts, tasks)
    dense = family.model(average(list(family.experts.values())))
    work = (args.work or args.experts / "work" / "layers") / args.family
    known = work / "profiles.json"
    if not known.exists():
        work.mkdir(parents=True, exist_ok=True)
        known.write_text(json.dumps(profiles_of(family, dense)))
    sizes: Counter[str] = Counter()
    for name, weight in family.base.items():
        sizes[layer_metrics.layer_of(name)] += weight.numel()
    gains = Gains(family, dense, work, args.seed, args.prompts)
    row = {"family": args.family, "tasks": tasks, "prompts": args.prompts}
    row |= row_of(gains, json.loads(known.read_text()) | of_place(gains.layers), sizes)
    path = record.RESULTS / f"{args.name}.json"
    kept = record.read(args.name)["rows"] if path.exists() else []
    rows = [r for r in kept if r["family"] != args.family] + [row]
    seeds = {"prompts": args.seed, "calibration": CALIBRATION_SEED, "own text": TEXT_SEED}
    print(f"written to {record.write(args.name, {'rows': rows}, seeds)}")
    layer_plots.gain_by_layer(rows, DRAWN, record.RESULTS / f"{args.name}.png")


if __name__ == "__main__":
    main()
