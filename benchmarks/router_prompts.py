"""Prompts for the router's benchmark: 25 reasoning-gym tasks, each asked in 26 ways.

Sixteen wordings of a task are for calibration, ten for the report only. Contents come from
reasoning-gym, by seed.
"""

import json
import os
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import reasoning_gym

Part = Literal["calibration", "report"]

EASY: Mapping[str, Mapping[str, int]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "family_relationships": {"min_family_size": 4, "max_family_size": 6},
    "word_sequence_reversal": {"min_words": 3, "max_words": 5},
    "letter_counting": {"min_words": 2, "max_words": 5},
}

# By task, `calibration` and `report`: 16 and 10 format strings (15 and 10 of one task). The first four and the first
# two are the project's own; the others were written by a language model, asked for what twenty people would type,
# which was shown one plain wording of each task, and were dealt out by chance.
WORDINGS: Mapping[str, Mapping[Part, list[str]]] = json.loads(
    Path(__file__).with_name("router_wordings.json").read_text(encoding="utf-8")
)

NEAR = (
    "power_function", "decimal_arithmetic", "time_intervals", "calendar_arithmetic",
    "leg_counting", "ransom_note", "word_ladder", "bitwise_arithmetic", "isomorphic_strings",
    "binary_alternation", "syllogism", "dice", "countdown", "number_sequence", "coin_flip",
)  # fmt: skip

# The first 64 tasks, by name, of those that are quick to make and not longer than a page.
MANY = (
    "ab", "acre", "aiw", "arc_1d", "base_conversion", "basic_arithmetic", "bf",
    "binary_alternation", "binary_matrix", "bitwise_arithmetic", "caesar_cipher",
    "calendar_arithmetic", "chain_sum", "circuit_logic", "coin_flip", "color_cube_rotation",
    "complex_arithmetic", "count_bits", "count_primes", "course_schedule", "cryptarithm",
    "decimal_arithmetic", "decimal_chain_sum", "dice", "emoji_mystery", "family_relationships",
    "figlet_font", "fraction_simplification", "game_of_life", "game_of_life_halting", "gcd",
    "graph_color", "group_anagrams", "gsm_symbolic", "isomorphic_strings", "jugs", "kakurasu",
    "knights_knaves", "largest_island", "lcm", "leg_counting", "letter_counting", "letter_jumble",
    "list_functions", "manipulate_matrix", "maze", "mini_sudoku", "modulo_grid", "n_queens",
    "number_filtering", "number_format", "number_sequence", "number_sorting",
    "palindrome_generation", "palindrome_partitioning", "path_star", "polynomial_multiplication",
    "pool_matrix", "power_function", "prime_factorization", "products", "propositional_logic",
    "ransom_note", "rotate_matrix",
)  # fmt: skip

_REQUESTS = (
    "Write a short poem about {}.",
    "What should I know about {} before I start?",
    "Explain {} to a ten year old.",
    "I disagree with my sister about {}. How can we talk about it?",
    "Draft an e-mail to my manager that mentions {}.",
    "Give me three opinions people hold on {} and why.",
    "Tell me a story in which {} plays a part.",
    "What is the history of {}?",
)
_TOPICS = (
    "the sea in winter", "good sleep", "the French Revolution", "sourdough bread",
    "Python decorators", "a late train", "growing tomatoes", "jazz", "vaccination", "moving house",
    "chess clubs", "the moon",
)  # fmt: skip


def _complex(value: tuple[float, float]) -> str:
    return f"{value[0]} {'-' if value[1] < 0 else '+'} {abs(value[1])}i"


def _fields(task: str, item: Mapping[str, Any]) -> dict[str, str]:
    """What the wordings of a task may name, each as text."""
    about = item["metadata"]
    joined = {"numbers", "words", "original_words", "letters", "original_numbers"}
    fields = {k: ", ".join(map(str, v)) if k in joined else v for k, v in about.items()
              if not (k in joined and not isinstance(v, list))}  # fmt: skip
    if task == "family_relationships":
        fields["story"] = item["question"].split("\n\n")[0]
    if task == "letter_counting":
        fields["span"] = " ".join(about["span"])
    if task == "complex_arithmetic":
        fields |= {"num1": _complex(about["num1"]), "num2": _complex(about["num2"])}
    if task == "number_filtering":
        fields["operation"] = about["operation"].replace("_", " all numbers ") + " than"
    if task in ("spiral_matrix", "rotate_matrix"):
        fields["matrix"] = "\n".join(" ".join(map(str, row)) for row in about["matrix"])
    if task == "rotate_matrix":
        fields["degrees"] = 90 * about["num_rotations"]
    return {k: str(v) for k, v in fields.items()}


def same_every_time() -> None:
    """Start Python again where its hashes differ between runs: some tasks draw from sets."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        command = [sys.executable, *sys.argv]
        os.execve(sys.executable, command, {**os.environ, "PYTHONHASHSEED": "0"})


def easy(per_task: int, seed: int) -> dict[str, list[str]]:
    """By task, prompts in reasoning-gym's own wording."""
    return {task: questions(task, per_task, seed, **config) for task, config in EASY.items()}


def hard(per_task: int, seed: int, part: Part, ways: int | None = None) -> dict[str, list[str]]:
    """By task, prompts that take turns in the wordings of a part, or in the first few of them."""
    prompts = {}
    for task, wordings in WORDINGS.items():
        config = EASY.get(task, {})
        items = reasoning_gym.create_dataset(task, size=per_task, seed=seed, **config)
        chosen = wordings[part][:ways]
        prompts[task] = [
            chosen[i % len(chosen)].format(**_fields(task, items[i])) for i in range(per_task)
        ]
    return prompts


def near(per_task: int, seed: int) -> list[str]:
    """Prompts of reasoning-gym tasks that no expert has."""
    return [prompt for task in NEAR for prompt in questions(task, per_task, seed)]


def far(count: int, seed: int) -> list[str]:
    """General requests, drawn without replacement (there are 96)."""
    every = [request.format(topic) for request in _REQUESTS for topic in _TOPICS]
    return random.Random(seed).sample(every, count)


def questions(task: str, count: int, seed: int, **config: int) -> list[str]:
    """reasoning-gym's own prompts of a task."""
    items = reasoning_gym.create_dataset(task, size=count, seed=seed, **config)
    return [items[i]["question"] for i in range(count)]
