"""Does blending help? Requests of tasks that no expert has, answered in every way that a router may.

    python benchmarks/blending.py BASE_DIR --work DIR [--experts DIR]

Merges four experts (the bundled adapters, or `train_experts.py`'s folders in `--experts`), routes
with and without calibration data, and scores the right answers by teacher forcing. `best single`
is the expert that answers best on the mean over these tasks, chosen in hindsight.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mergekit.merge
import record
import torch
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from train_experts import FAMILIES, RECIPES

from mergekit_mediator import MediatorModel
from mergekit_mediator.cli import demo
from mergekit_mediator.evaluate.results import AnswerScore, Score
from mergekit_mediator.evaluate.scorer import score_answers
from mergekit_mediator.evaluate.tasks import Example, from_reasoning_gym
from mergekit_mediator.merge import plugin
from mergekit_mediator.models.loading import load_plain
from mergekit_mediator.route.calibrate import calibrate_artifact
from mergekit_mediator.route.decision import RoutingDecision

# reasoning-gym draws problem i of seed s as problem i - 1 of seed s + 1: seeds must lie far apart
CALIBRATION_SEED, REPORT_SEED, CHOICE_SEED = 11, 100_007, 200_003
PER_EXPERT = 20
# Short tasks of which a small model knows something; the first are like an expert's task.
REPORTED: Mapping[str, Mapping[str, int]] = {
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "word_sorting": {"min_words": 3, "max_words": 3},
    "spell_backward": {"min_word_len": 3, "max_word_len": 4},
    "number_sorting": {"min_numbers": 3, "max_numbers": 3},
    "gcd": {"min_value": 1, "max_value": 30},
    "count_bits": {"min_n": 1, "max_n": 60},
    "leg_counting": {"min_animals": 1, "max_animals": 2},
    "coin_flip": {"min_trials": 1, "max_trials": 3},
    "isomorphic_strings": {},
    "calendar_arithmetic": {},
}
# To choose the default action on, and not reported.
CHOICE: Mapping[str, Mapping[str, int]] = {
    "basic_arithmetic": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "lcm": {"min_value": 1, "max_value": 12},
    "decimal_chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "fraction_simplification": {"min_value": 1, "max_value": 20},
    "letter_jumble": {"min_words": 1, "max_words": 2},
    "number_format": {},
}
Mixture = tuple[tuple[str, float], ...]

# By name: policy, out-of-distribution threshold (None is the calibrated one) and fallback.
POLICIES: Mapping[str, tuple[Any, float | None, str | None]] = {
    "hard": ("hard", math.inf, None),
    "soft": ("soft", math.inf, None),
    "auto": ("auto", math.inf, None),
    "auto, far blended": ("auto", None, None),
    "auto, far dense": ("auto", None, "dense"),
}


def artifact_of(
    base: Path, experts: Path | None, work: Path
) -> tuple[Path, dict[str, dict[str, Any]]]:
    """A merged artifact, and by expert what `from_reasoning_gym` takes."""
    if experts is not None:
        tasks = {t: {"name": t, "config": RECIPES[t].config} for t in FAMILIES["strong4"]}
        models = {t: str((experts / t).resolve()) for t in tasks}
        parameters: dict[str, Any] = {"budget": "1.06x"}
    else:
        tasks = {
            path.parent.name: json.loads(path.read_text())
            for path in sorted(demo.ADAPTERS.glob("*/skill.json"))
        }
        tasks = {n: {"name": s["task"], "config": s["config"]} for n, s in tasks.items()}
        models = {name: f"{base.resolve()}+{demo.ADAPTERS / name}" for name in tasks}
        parameters = {"route": "all"}
    out = work / ("fine-tunes" if experts else "adapters")
    if not out.exists():
        config = {
            "merge_method": "mediator",
            "base_model": str(base.resolve()),
            "models": [{"model": m, "parameters": {"expert": n}} for n, m in models.items()],
            "parameters": parameters,
            "dtype": "float32",
            "out_dtype": "bfloat16",
        }
        options = MergeOptions(lora_merge_cache=str(work / "merged"), write_model_card=False)
        mergekit.merge.run_merge(MergeConfiguration.model_validate(config), str(out), options)
    return out, tasks


class Answers:
    """Scores of examples under mixtures of one artifact, each once."""

    def __init__(self, model: MediatorModel, examples: Sequence[Example]) -> None:
        self.model, self.examples = model, examples
        self.known: dict[tuple[int, Mixture], AnswerScore] = {}

    def under(self, mixtures: Sequence[Mixture]) -> list[AnswerScore]:
        """Each example under its own mixture."""
        wanted = dict.fromkeys(zip(range(len(mixtures)), mixtures, strict=True))
        missing = [key for key in wanted if key not in self.known]
        for mixture in dict.fromkeys(mixture for _, mixture in missing):
            rows = [row for row, used in missing if used == mixture]
            with self.model.mixture(dict(mixture)) as mixed:
                found = score_answers(mixed, self.model.tokenizer, [self.examples[r] for r in rows])
            self.known |= {(row, mixture): s for row, s in zip(rows, found, strict=True)}
        return [self.known[key] for key in wanted]


def mixture(model: MediatorModel, decision: RoutingDecision, router: Any, policy: str) -> Mixture:
    """What a policy makes of one decision; weights are rounded, so that like ones are run once."""
    model.policy, model.ood_threshold, model.fallback = POLICIES[policy]
    (weights,) = model.mixtures(decision, router).tolist()
    pairs = zip(decision.experts, weights, strict=True)
    return tuple((name, round(p, 2)) for name, p in pairs if p >= 0.005)


def measure(
    model: MediatorModel, base: Any, tasks: Mapping[str, Mapping[str, Any]], seed: int, count: int
) -> dict[str, Any]:
    """By system: nats per answer token and accuracy, by task and on the mean."""
    sets = {t: from_reasoning_gym(t, count, seed, c).examples for t, c in tasks.items()}
    examples = [example for own in sets.values() for example in own]
    answers = Answers(model, examples)
    found = {
        "base": score_answers(base, model.tokenizer, examples),
        "dense": answers.under([()] * len(examples)),
        **{name: answers.under([((name, 1.0),)] * len(examples)) for name in model.experts},
    }
    flagged = 0.0
    for router in ("response", "calibrated"):
        decisions = [model.route(str(example.prompt), router=router) for example in examples]
        for policy in POLICIES if router == "calibrated" else list(POLICIES)[:3]:
            chosen = [mixture(model, decision, router, policy) for decision in decisions]
            found[f"{router}: {policy}"] = answers.under(chosen)
            print(router, policy, len(set(chosen)), "mixtures", flush=True)
            if policy == "auto, far dense":
                flagged = sum(not row for row in chosen) / len(chosen)
    rows = {name: summary(scores, list(sets), count) for name, scores in found.items()}
    best = max(model.experts, key=lambda name: rows[name]["log_likelihood"])
    return {"systems": rows, "best_single": best, "flagged": flagged}


def summary(found: Sequence[AnswerScore], tasks: Sequence[str], count: int) -> dict[str, Any]:
    by_task = {
        task: Score.of(list(found[i * count : (i + 1) * count])) for i, task in enumerate(tasks)
    }
    means = {
        task: {"log_likelihood": score.answer_log_likelihood, "accuracy": score.accuracy}
        for task, score in by_task.items()
    }
    return {
        "log_likelihood": sum(m["log_likelihood"] for m in means.values()) / len(means),
        "accuracy": sum(m["accuracy"] for m in means.values()) / len(means),
        "tasks": means,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--experts", type=Path)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument(
        "--choice", action="store_true", help="on the tasks to choose on; no report"
    )
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    plugin.install()
    arguments.work.mkdir(parents=True, exist_ok=True)
    root, known = artifact_of(arguments.base, arguments.experts, arguments.work)
    data = {}
    for name, about in known.items():
        examples = from_reasoning_gym(about["name"], PER_EXPERT, CALIBRATION_SEED, about["config"])
        data[name] = arguments.work / f"{name}.jsonl"
        lines = [json.dumps({"prompt": example.prompt}) for example in examples.examples]
        data[name].write_text("\n".join(lines))
    model = MediatorModel.from_pretrained(root)
    calibrate_artifact(root, model.model, model.tokenizer, data)
    model = MediatorModel.from_pretrained(root)
    base = load_plain(arguments.base)
    tasks, seed = (CHOICE, CHOICE_SEED) if arguments.choice else (REPORTED, REPORT_SEED)
    figures = measure(model, base, tasks, seed, arguments.prompts)
    for name, row in figures["systems"].items():
        print(f"{name:32s} {row['log_likelihood']:.4f} {row['accuracy']:.4f}")
    if not arguments.choice:
        family = "full fine-tunes" if arguments.experts else "adapters"
        path = record.RESULTS / "blending.json"
        families = record.read("blending")["families"] if path.exists() else {}
        families[family] = {"prompts_per_task": arguments.prompts, **figures}
        seeds = {"calibration": CALIBRATION_SEED, "report": REPORT_SEED}
        record.write("blending", {"families": families}, seeds)
    else:
        (arguments.work / "choice.json").write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
